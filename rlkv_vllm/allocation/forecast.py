"""How much cache a split model needs: exact integer accounting of blocks and pages.

The engine's start-up log, the endpoint and `rlkv profile plan` all use these functions.
"Stock" is vLLM without the split: every KV head full. "Ideal" is a split without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlkv_vllm.allocation.groups import CacheGroups, pack
from rlkv_vllm.allocation.heads import allocate

TARGET_TOKENS = 4096  # request length that the packing is made for
BLOCK_SIZE_MULTIPLE = 16  # block sizes that the attention paths accept are multiples of this
#: vLLM's CPU kernel reads 8-bit caches by whole vectors of 32 tokens only.
FP8_BLOCK_SIZE_MULTIPLE = 32
# Tried in this order: vLLM's CPU kernel is a quarter slower on blocks of 16 tokens, but rings
# waste less with them.
PREFERRED_BLOCK_SIZES = (32, 16)
BLOCK_SIZE_WASTE = 1.03  # a block size may cost this much more memory than the tokens in it
NULL_BLOCKS = 1  # vLLM reserves one block of the pool as the null block


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of one model's KV cache.

    Attributes:
        num_layers: attention layers.
        num_kv_heads: KV heads per layer of the whole model.
        head_dim: elements of one key or value.
        dtype_bytes: bytes per element of the cache.
        block_size: tokens per block.
        sink: first tokens that streaming heads keep.
        window: last tokens that streaming heads keep.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int
    block_size: int
    sink: int
    window: int

    @property
    def head_token_bytes(self) -> int:
        """Key and value of one token in one KV head."""
        return 2 * self.head_dim * self.dtype_bytes

    @property
    def page_bytes(self) -> int:
        """One block of one KV head."""
        return self.block_size * self.head_token_bytes

    def full_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` holds in the full group."""
        return _blocks(num_tokens, self.block_size)

    def ring_blocks(self, num_tokens: int) -> int:
        """Most blocks that it holds in a ring group."""
        return ring_blocks(num_tokens, self.sink, self.window, self.block_size)


def ring_blocks(num_tokens: int, sink: int, window: int, block_size: int) -> int:
    """Most blocks that a decoding request ever holds in a ring group.

    Its sink blocks stay; the last `window` tokens, which may begin anywhere in a block, touch
    one block more than they fill.

    Args:
        num_tokens: length of the request.
        sink: first tokens kept.
        window: last tokens kept.
        block_size: tokens per block.
    """
    ring = _blocks(sink, block_size) + _blocks(window - 1, block_size) + 1
    return min(_blocks(num_tokens, block_size), ring)


@dataclass(frozen=True)
class Forecast:
    """Memory of a split model, against stock vLLM and against the ideal.

    Memory is per rank, as vLLM's `kv_cache_memory_bytes` is.

    Attributes:
        geometry: sizes of the cache.
        groups: the split.
    """

    geometry: CacheGeometry
    groups: CacheGroups

    @property
    def ranks(self) -> range:
        return range(self.groups.allocation.tp_size)

    def block_bytes(self, rank: int) -> int:
        """One block of the shared pool on `rank`."""
        return self.groups.pages_per_block(rank) * self.geometry.page_bytes

    @property
    def stock_block_bytes(self) -> int:
        """One block of stock vLLM on every rank."""
        return self._heads_on_rank * self.geometry.page_bytes

    def bytes_per_token(self, rank: int) -> int:
        """What one more token of a request longer than its rings costs on `rank`."""
        if not self.groups.allocation.num_full:
            return 0
        return self.groups.pages_per_block(rank) * self.geometry.head_token_bytes

    @property
    def stock_bytes_per_token(self) -> int:
        """What every token costs stock vLLM on every rank."""
        return self._heads_on_rank * self.geometry.head_token_bytes

    def blocks_per_request(self, num_tokens: int) -> int:
        """Blocks of the shared pool that a request of `num_tokens` holds at its peak."""
        full = self.geometry.full_blocks(num_tokens) if self.groups.allocation.num_full else 0
        return full + self.groups.num_ring_groups * self.geometry.ring_blocks(num_tokens)

    def admission_blocks(self, num_tokens: int, steps_in_flight: int = 1) -> int:
        """Blocks that must be free for it: while chunks are prefilled, the window before each
        that is in flight and the one at the end are held.

        Args:
            num_tokens: length of the request.
            steps_in_flight: 2 with asynchronous scheduling.
        """
        geometry, groups = self.geometry, self.groups
        window = _blocks(geometry.window - 1, geometry.block_size) + 1
        ring = min(
            _blocks(geometry.sink, geometry.block_size) + (1 + steps_in_flight) * window,
            geometry.full_blocks(num_tokens),
        )
        full = geometry.full_blocks(num_tokens) if groups.allocation.num_full else 0
        return full + groups.num_ring_groups * ring

    def bytes_per_request(self, num_tokens: int, rank: int) -> int:
        """What such a request holds on `rank`, padding included."""
        return self.blocks_per_request(num_tokens) * self.block_bytes(rank)

    def stock_bytes_per_request(self, num_tokens: int) -> int:
        """What it holds on every rank of stock vLLM."""
        return self.geometry.full_blocks(num_tokens) * self.stock_block_bytes

    def ideal_bytes_per_request(self, num_tokens: int, rank: int) -> int:
        """What it would hold on `rank` if nothing were padded."""
        allocation, geometry = self.groups.allocation, self.geometry
        pages = allocation.num_full_on(rank) * geometry.full_blocks(num_tokens)
        pages += allocation.num_streaming_on(rank) * geometry.ring_blocks(num_tokens)
        return pages * geometry.page_bytes

    def waste(self, num_tokens: int) -> float:
        """Share by which such a request holds more than ideal, e.g. 0.02.

        Measured on the rank where it holds most, since that one decides how many blocks the
        pool has.
        """
        actual = max(self.bytes_per_request(num_tokens, rank) for rank in self.ranks)
        ideal = max(self.ideal_bytes_per_request(num_tokens, rank) for rank in self.ranks)
        return actual / ideal - 1

    def num_blocks(self, memory_bytes: int) -> int:
        """Blocks of the shared pool in `memory_bytes` per rank; the tightest rank decides."""
        return memory_bytes // max(self.block_bytes(rank) for rank in self.ranks)

    def stock_num_blocks(self, memory_bytes: int) -> int:
        """Blocks of stock vLLM's pool in `memory_bytes` per rank."""
        return memory_bytes // self.stock_block_bytes

    def requests_at_once(self, num_tokens: int, memory_bytes: int) -> int:
        """Requests of `num_tokens` that fit at once."""
        return self.requests_in(self.num_blocks(memory_bytes), num_tokens)

    def requests_in(self, num_blocks: int, num_tokens: int) -> int:
        """Requests of `num_tokens` that fit at once in a pool of `num_blocks`."""
        return max(0, num_blocks - NULL_BLOCKS) // self.blocks_per_request(num_tokens)

    def stock_requests_at_once(self, num_tokens: int, memory_bytes: int) -> int:
        """Requests of `num_tokens` that fit stock vLLM at once."""
        blocks = max(0, self.stock_num_blocks(memory_bytes) - NULL_BLOCKS)
        return blocks // self.geometry.full_blocks(num_tokens)

    @property
    def _heads_on_rank(self) -> int:
        return self.geometry.num_layers * self.groups.allocation.heads_per_rank


def forecast_split(
    gates: Sequence[Sequence[float]],
    sparsity: float,
    geometry: CacheGeometry,
    *,
    tp_size: int = 1,
    max_model_len: int = TARGET_TOKENS,
) -> Forecast:
    """Allocate and pack as the engine does, for requests of up to `TARGET_TOKENS` tokens.

    Args:
        gates: [layers][KV heads].
        sparsity: share of streaming heads.
        geometry: sizes of the cache.
        tp_size: tensor-parallel ranks.
        max_model_len: longest request; a shorter target than `TARGET_TOKENS` if it is smaller.

    Raises:
        RlkvError: as `allocate`.
    """
    target = min(max_model_len, TARGET_TOKENS)
    groups = pack(
        allocate(gates, sparsity, tp_size),
        full_blocks=geometry.full_blocks(target),
        ring_blocks=geometry.ring_blocks(target),
    )
    return Forecast(geometry, groups)


def block_sizes_for(head_dim: int, *, is_fp8: bool = False) -> tuple[int, ...]:
    """Block sizes to choose from when the user names none (tokens)."""
    if is_fp8:
        return (FP8_BLOCK_SIZE_MULTIPLE,)
    # vLLM's faster CPU kernel wants whole vectors of 32 elements.
    return PREFERRED_BLOCK_SIZES if head_dim % 32 == 0 else (BLOCK_SIZE_MULTIPLE,)


def forecast_with_block_size(
    gates: Sequence[Sequence[float]],
    sparsity: float,
    geometry: CacheGeometry,
    block_sizes: Sequence[int],
    *,
    tp_size: int = 1,
    max_model_len: int = TARGET_TOKENS,
) -> Forecast:
    """`forecast_split` with the first block size that wastes little, else the smallest waste.

    Args:
        gates: [layers][KV heads].
        sparsity: share of streaming heads.
        geometry: sizes of the cache; its block size is not looked at.
        block_sizes: to choose from, the fastest first (tokens).
        tp_size: tensor-parallel ranks.
        max_model_len: longest request.

    Raises:
        RlkvError: as `allocate`.
    """
    tokens = min(max_model_len, TARGET_TOKENS)
    ring = min(tokens, geometry.sink + geometry.window)

    def waste(forecast: Forecast) -> float:
        allocation = forecast.groups.allocation
        return max(
            forecast.bytes_per_request(tokens, rank)
            / geometry.head_token_bytes
            / (allocation.num_full_on(rank) * tokens + allocation.num_streaming_on(rank) * ring)
            for rank in forecast.ranks
        )

    forecasts = [
        forecast_split(
            gates,
            sparsity,
            replace(geometry, block_size=block_size),
            tp_size=tp_size,
            max_model_len=max_model_len,
        )
        for block_size in block_sizes
    ]
    small = (forecast for forecast in forecasts if waste(forecast) <= BLOCK_SIZE_WASTE)
    return next(small, min(forecasts, key=waste))


def _blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
