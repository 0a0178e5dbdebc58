"""The heads of one kind in one attention layer on the CPU: their caches and how they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rlkv_vllm.engine.cache.split_layer import StepMetadata
from rlkv_vllm.engine.cpu.paged import CacheNumber, PagedCache, PagedRequests
from rlkv_vllm.kernels.cpu.ring_tiles import PAGE, Scratch, Tiles, plan_ring_step
from rlkv_vllm.kernels.cpu.streaming import StepPlan, plan_step, streaming_attention

if TYPE_CHECKING:
    from rlkv_vllm.allocation.forecast import CacheGeometry

#: vLLM's kernel for pages of 16; compiled on every platform.
_RING_ISA = "vec16"

#: vLLM's names of 8-bit caches, which it keeps as bytes.
_FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass
class SplitMetadata(StepMetadata):
    """One step as one block table sees it; derived parts are made once and shared by layers."""

    full: PagedRequests | None = None
    ring: _RingRequests | None = None
    streaming: StepPlan | None = None


class Heads(Protocol):
    """Heads of one attention layer that read one block table."""

    def attend(
        self,
        step: SplitMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write the step's keys and values, then attend.

        Args:
            step: of the heads' block table.
            query: ``[tokens, query heads, head_dim]``.
            key: ``[tokens, KV heads, head_dim]``.
            value: as ``key``.
            output: as ``query``, dense; filled in place.
        """


class FullHeads:
    """Full heads: vLLM's operator as vLLM uses it.

    Args:
        blocks: ``[blocks, heads, block_size, 2 * head_dim]``.
        isa: vLLM's kernel for the block size.
        scale: factor on ``q @ k``.
        number: how a number stands in the cache.
    """

    def __init__(self, blocks: torch.Tensor, isa: str, scale: float, number: CacheNumber) -> None:
        self._cache = PagedCache(blocks, isa, number)
        self._scale = scale

    def attend(
        self,
        step: SplitMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See :class:`Heads`."""
        if step.full is None:
            step.full = PagedRequests(step.block_table, step.seq_lens, step.query_start_loc)
        self._cache.write(key, value, step.slot_mapping)
        step.full.attend(self._cache, query, output, self._scale)


class _RingRequests:
    """A step's tiles for the operator."""

    def __init__(self, step: StepMetadata, geometry: CacheGeometry) -> None:
        plan = plan_ring_step(
            step.block_table,
            step.seq_lens,
            step.query_start_loc,
            step.slot_mapping[: step.num_actual_tokens],
            block_size=geometry.block_size,
            sink=geometry.sink,
            window=geometry.window,
        )
        self._visible = geometry.sink + geometry.window
        self.slots = plan.slots
        self.decode = self._part(plan.decode)
        self.prefill = self._part(plan.prefill)
        self.scratch = plan.scratch

    def _part(self, tiles: Tiles | None) -> tuple[torch.Tensor | None, PagedRequests] | None:
        if tiles is None:
            return None
        requests = PagedRequests(tiles.tables, tiles.lengths, tiles.starts, self._visible)
        return tiles.rows, requests


class RingHeads:
    """Streaming heads whose sink is whole pages: vLLM's operator over short tables.

    Args:
        blocks: ``[blocks, heads, block_size, 2 * head_dim]``.
        geometry: sizes of the cache.
        scale: factor on ``q @ k``.
    """

    def __init__(self, blocks: torch.Tensor, geometry: CacheGeometry, scale: float) -> None:
        num_blocks, num_heads, block_size, content = blocks.shape
        # A head's blocks are dense: smaller pages lie in them one after the other.
        pages = blocks.as_strided(
            (num_blocks * block_size // PAGE, num_heads, PAGE, content),
            (PAGE * content, blocks.stride(1), content, 1),
        )
        self._cache = PagedCache(pages, _RING_ISA)
        self._geometry = geometry
        self._scale = scale

    def attend(
        self,
        step: SplitMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See :class:`Heads`."""
        if step.ring is None:
            step.ring = _RingRequests(step, self._geometry)
        ring = step.ring
        self._cache.write(key, value, ring.slots)
        if ring.decode is not None:
            self._part(*ring.decode, self._cache, query, output)
        if ring.prefill is not None and ring.scratch is not None:
            rows = ring.prefill[0]
            cache = self._gather(ring.scratch, key[rows], value[rows])
            self._part(*ring.prefill, cache, query, output)

    def _part(
        self,
        rows: torch.Tensor | None,
        requests: PagedRequests,
        cache: PagedCache,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        if rows is None:
            requests.attend(cache, query, output, self._scale)
            return
        query = query.index_select(0, rows)
        answer = torch.empty_like(query)
        requests.attend(cache, query, answer, self._scale)
        output.index_copy_(0, rows, answer)

    def _gather(self, plan: Scratch, key: torch.Tensor, value: torch.Tensor) -> PagedCache:
        """The keys and values that the tiles of a prefill read."""
        pages = key.new_empty(plan.num_pages, *self._cache.pages.shape[1:])
        pages.index_fill_(0, plan.ends, 0)  # 0 * NaN: what is masked is multiplied all the same
        pages.index_copy_(0, plan.copies, self._cache.pages.index_select(0, plan.cached))
        scratch = PagedCache(pages, _RING_ISA)
        scratch.write(key, value, plan.slots)
        return scratch


class StreamingHeads:
    """Streaming heads with any sink and any type of cache.

    Args:
        blocks: ``[blocks, heads, block_size, 2 * head_dim]``.
        geometry: sizes of the cache.
        scale: factor on ``q @ k``.
        number: how a number stands in the cache.
    """

    def __init__(
        self, blocks: torch.Tensor, geometry: CacheGeometry, scale: float, number: CacheNumber
    ) -> None:
        num_blocks, num_heads, block_size, content = blocks.shape
        # [heads, slots, 2 * head_dim]: a head's blocks are dense, so slots are rows.
        self._slots = blocks.as_strided(
            (num_heads, num_blocks * block_size, content), (blocks.stride(1), content, 1)
        )
        if number.dtype in _FP8:
            self._slots = self._slots.view(_FP8[number.dtype])
        self._number = number
        self._geometry = geometry
        self._scale = scale

    def attend(
        self,
        step: SplitMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See :class:`Heads`."""
        n, num_heads, head_dim = key.shape
        if step.streaming is None:
            step.streaming = plan_step(
                step.block_table,
                step.seq_lens,
                step.query_start_loc,
                step.slot_mapping[:n],
                block_size=self._geometry.block_size,
                sink=self._geometry.sink,
                window=self._geometry.window,
            )
        per_head = (n, num_heads, query.shape[1] // num_heads, head_dim)
        streaming_attention(
            step.streaming,
            self._slots,
            query.view(per_head),
            key,
            value,
            output.view(per_head),
            self._scale,
            self._number.k_scale,
            self._number.v_scale,
        )
