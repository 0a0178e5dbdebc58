"""How much cache a split model needs: exact integer accounting of blocks and pages.

The engine's start-up log, the endpoint and `rlkv profile plan` all use these functions.
"Stock" is vLLM without the split: every KV head full. "Ideal" is a split without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlkv_vllm.allocation.groups import CacheGroups, pack
from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.ring import num_blocks, ring_blocks

TARGET_TOKENS = 4096  # request length that the packing is made for
BLOCK_SIZE_MULTIPLE = 16  # of every block size that the attention paths accept
#: vLLM's CPU kernel reads 8-bit caches in vectors of 32 tokens only.
FP8_BLOCK_SIZE_MULTIPLE = 32
# In this order: vLLM's CPU kernel is a quarter slower with blocks of 16, but rings waste less.
PREFERRED_BLOCK_SIZES = (32, 16)
BLOCK_SIZE_WASTE = 1.03  # a block size may cost this much more memory than the tokens in it
NULL_BLOCKS = 1  # vLLM reserves one block of the pool as the null block


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of one model's KV cache, all ranks together; block, sink and window in tokens."""

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
        return num_blocks(num_tokens, self.block_size)

    def ring_blocks(self, num_tokens: int, num_windows: int = 1) -> int:
        """Most blocks that it holds in a ring group; `num_windows` as in `ring.ring_blocks`."""
        return ring_blocks(
            num_tokens, self.sink, self.window, self.block_size, num_windows=num_windows
        )


@dataclass(frozen=True)
class Forecast:
    """Memory of a split model, against stock vLLM and against the ideal.

    Memory is per rank, as vLLM's `kv_cache_memory_bytes` is.
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
        """Bytes of one more token of a request longer than its rings, on `rank`."""
        if not self.groups.allocation.num_full:
            return 0
        return self.groups.pages_per_block(rank) * self.geometry.head_token_bytes

    @property
    def stock_bytes_per_token(self) -> int:
        """Bytes of every token in stock vLLM, on every rank."""
        return self._heads_on_rank * self.geometry.head_token_bytes

    def blocks_per_request(self, num_tokens: int, num_windows: int = 1) -> int:
        """Blocks of the shared pool that a request of `num_tokens` holds at its peak."""
        full = self.geometry.full_blocks(num_tokens) if self.groups.allocation.num_full else 0
        ring = self.geometry.ring_blocks(num_tokens, num_windows)
        return full + self.groups.num_ring_groups * ring

    def admission_blocks(self, num_tokens: int, steps_in_flight: int = 1) -> int:
        """Blocks that must be free to admit it; asynchronous scheduling has 2 steps in flight."""
        return self.blocks_per_request(num_tokens, 1 + steps_in_flight)

    def bytes_per_request(self, num_tokens: int, rank: int) -> int:
        """Bytes that such a request holds on `rank`, padding included."""
        return self.blocks_per_request(num_tokens) * self.block_bytes(rank)

    def stock_bytes_per_request(self, num_tokens: int) -> int:
        """Bytes that it holds on every rank of stock vLLM."""
        return self.geometry.full_blocks(num_tokens) * self.stock_block_bytes

    def ideal_bytes_per_request(self, num_tokens: int, rank: int) -> int:
        """Bytes that it would hold on `rank` without padding."""
        allocation, geometry = self.groups.allocation, self.geometry
        pages = allocation.num_full_on(rank) * geometry.full_blocks(num_tokens)
        pages += allocation.num_streaming_on(rank) * geometry.ring_blocks(num_tokens)
        return pages * geometry.page_bytes

    def waste(self, num_tokens: int) -> float:
        """Share by which such a request holds more than ideal, e.g. 0.02, on the tightest rank."""
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


def block_sizes_for(head_dim: int, *, is_fp8: bool = False) -> tuple[int, ...]:
    """Block sizes to choose from when the user names none (tokens)."""
    if is_fp8:
        return (FP8_BLOCK_SIZE_MULTIPLE,)
    # vLLM's faster CPU kernel wants vectors of 32 elements.
    return PREFERRED_BLOCK_SIZES if head_dim % 32 == 0 else (BLOCK_SIZE_MULTIPLE,)


def forecast_split(
    gates: Sequence[Sequence[float]],
    sparsity: float,
    geometry: CacheGeometry,
    *,
    block_sizes: Sequence[int] = (),
    tp_size: int = 1,
    max_model_len: int = TARGET_TOKENS,
) -> Forecast:
    """Allocate and pack as the engine does, for requests of up to `TARGET_TOKENS` tokens.

    Of `block_sizes`, the fastest first and instead of the geometry's, the first one that wastes
    little is taken, else the one that wastes least. `gates` are [layers][KV heads].

    Raises:
        RlkvError: as `allocate`.
    """
    allocation = allocate(gates, sparsity, tp_size)
    tokens = min(max_model_len, TARGET_TOKENS)

    def forecast(block_size: int) -> Forecast:
        sized = replace(geometry, block_size=block_size)
        full_blocks, ring_blocks = sized.full_blocks(tokens), sized.ring_blocks(tokens)
        return Forecast(sized, pack(allocation, full_blocks=full_blocks, ring_blocks=ring_blocks))

    def waste(forecast: Forecast) -> float:
        """Bytes of a request over those of the tokens that its heads keep."""
        ring = min(tokens, geometry.sink + geometry.window)
        return max(
            forecast.bytes_per_request(tokens, rank)
            / geometry.head_token_bytes
            / (allocation.num_full_on(rank) * tokens + allocation.num_streaming_on(rank) * ring)
            for rank in forecast.ranks
        )

    forecasts = [forecast(block_size) for block_size in block_sizes or (geometry.block_size,)]
    small = (found for found in forecasts if waste(found) <= BLOCK_SIZE_WASTE)
    return next(small, min(forecasts, key=waste))
