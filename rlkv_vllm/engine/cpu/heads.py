"""The heads of one kind in one attention layer on the CPU: their caches and how they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlkv_vllm.engine.cache.split_layer import StepMetadata
from rlkv_vllm.engine.cpu.paged import CacheNumber, PagedCache, PagedRequests
from rlkv_vllm.kernels.cpu.ring_tiles import PAGE, Scratch, Tiles, plan_ring_step
from rlkv_vllm.kernels.cpu.step import StreamingStep
from rlkv_vllm.kernels.cpu.streaming import StepPlan, plan_step, streaming_attention

if TYPE_CHECKING:
    from rlkv_vllm.allocation.forecast import CacheGeometry

#: vLLM's kernel for pages of 16; compiled on every platform.
_RING_ISA = "vec16"

#: vLLM's names of 8-bit caches, which it keeps as bytes.
_FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass
class SplitMetadata(StepMetadata):
    """One step as one block table sees it; derived parts are made once and shared by layers."""

    full: PagedRequests | None = None
    ring: _RingRequests | None = None
    streaming: StepPlan | None = None


class Heads(Protocol):
    """Heads of one attention layer that read one block table.

    Their ``blocks`` are ``[blocks, heads, block_size, 2 * head_dim]``, dense for each head;
    ``scale`` is the factor on ``q @ k``.
    """

    def attend(self, step: SplitMetadata, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Write the step's keys and values, attend, and fill ``out``, which is dense.

        ``q`` to ``out``: ``[tokens, heads, head_dim]``; ``step``: that of the heads' block table.
        """


class FullHeads:
    """Full heads: vLLM's operator as vLLM uses it, with the kernel `isa` for the block size."""

    def __init__(self, blocks: Tensor, isa: str, scale: float, number: CacheNumber) -> None:
        self._cache = PagedCache(blocks, isa, number)
        self._scale = scale

    def attend(self, step: SplitMetadata, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if step.full is None:
            step.full = PagedRequests(step.block_table, step.seq_lens, step.query_start_loc)
        self._cache.write(k, v, step.slot_mapping)
        step.full.attend(self._cache, q, out, self._scale)


def _streaming_step(step: StepMetadata, geometry: CacheGeometry) -> StreamingStep:
    return StreamingStep(
        step.block_table,
        step.seq_lens,
        step.query_start_loc,
        step.slot_mapping[: step.num_actual_tokens],
        geometry.block_size,
        geometry.sink,
        geometry.window,
    )


#: Which rows of the step, None for all, and their requests.
_Part = tuple[Tensor | None, PagedRequests]


class _RingRequests:
    """A step's tiles for the operator."""

    def __init__(self, step: StepMetadata, geometry: CacheGeometry) -> None:
        plan = plan_ring_step(_streaming_step(step, geometry))
        visible = geometry.sink + geometry.window

        def part(tiles: Tiles) -> _Part:
            return tiles.rows, PagedRequests(tiles.tables, tiles.lengths, tiles.starts, visible)

        self.slots = plan.slots
        self.decode = part(plan.decode) if plan.decode else None
        self.prefill = (part(plan.prefill[0]), plan.prefill[1]) if plan.prefill else None


class RingHeads:
    """Streaming heads whose sink fills its pages: vLLM's operator over short tables."""

    def __init__(self, blocks: Tensor, geometry: CacheGeometry, scale: float) -> None:
        num_blocks, num_heads, block_size, content = blocks.shape
        # A head's blocks are dense: smaller pages lie in them one after the other.
        pages = blocks.as_strided(
            (num_blocks * block_size // PAGE, num_heads, PAGE, content),
            (PAGE * content, blocks.stride(1), content, 1),
        )
        self._cache = PagedCache(pages, _RING_ISA)
        self._geometry = geometry
        self._scale = scale

    def attend(self, step: SplitMetadata, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if step.ring is None:
            step.ring = _RingRequests(step, self._geometry)
        ring = step.ring
        self._cache.write(k, v, ring.slots)
        if ring.decode is not None:
            self._attend(ring.decode, self._cache, q, out)
        if ring.prefill is not None:
            part, scratch = ring.prefill
            self._attend(part, self._gather(scratch, k[part[0]], v[part[0]]), q, out)

    def _attend(self, part: _Part, cache: PagedCache, q: Tensor, out: Tensor) -> None:
        rows, requests = part
        if rows is None:
            requests.attend(cache, q, out, self._scale)
            return
        q = q.index_select(0, rows)
        answer = torch.empty_like(q)
        requests.attend(cache, q, answer, self._scale)
        out.index_copy_(0, rows, answer)

    def _gather(self, plan: Scratch, k: Tensor, v: Tensor) -> PagedCache:
        """The keys and values that the tiles of a prefill read."""
        pages = k.new_empty(plan.num_pages, *self._cache.pages.shape[1:])
        pages.index_fill_(0, plan.ends, 0)  # 0 * NaN: what is masked is multiplied all the same
        pages.index_copy_(0, plan.copies, self._cache.pages.index_select(0, plan.cached))
        scratch = PagedCache(pages, _RING_ISA)
        scratch.write(k, v, plan.slots)
        return scratch


class StreamingHeads:
    """Streaming heads with any sink and any type of cache."""

    def __init__(
        self, blocks: Tensor, geometry: CacheGeometry, scale: float, number: CacheNumber
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

    def attend(self, step: SplitMetadata, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        n, num_heads, head_dim = k.shape
        if step.streaming is None:
            step.streaming = plan_step(_streaming_step(step, self._geometry))
        per_head = (n, num_heads, q.shape[1] // num_heads, head_dim)
        streaming_attention(
            step.streaming,
            self._slots,
            q.view(per_head),
            k,
            v,
            out.view(per_head),
            self._scale,
            self._number.k_scale,
            self._number.v_scale,
        )
