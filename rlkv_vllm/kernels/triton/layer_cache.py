"""What the launches of a layer share: where each KV head's pages are, and the step's requests.

Shape suffixes: R requests, B blocks of a table, H KV heads, N tokens of a block, C = 2 * head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements in a unit of a head's offset. With it the compiler can prove that rows are aligned, and
#: loads them in 16-byte pieces.
OFFSET_UNIT = 16


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step and what their heads see; attributes as in `split_attention`."""

    gates_H: Tensor | None
    full_table_RB: Tensor
    ring_table_RB: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    sink: int
    window: int
    scale_log2: float  # factor on q @ k, times log2(e)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensor arguments of the attention kernels."""
        tables = (self.full_table_RB, self.ring_table_RB)
        return (self.gates_H, *tables, self.query_start_loc, self.seq_lens)

    def scalars(self, cache: LayerCache) -> tuple[float, ...]:
        """Strides of tables and cache, and the numbers of the attention kernels."""
        tables = (self.full_table_RB.stride(0), self.ring_table_RB.stride(0))
        return (*tables, *cache.strides, self.sink, self.window, self.scale_log2)


@dataclass(frozen=True)
class LayerCache:
    """The head caches of one attention layer on one rank.

    One page is one block of one KV head, ``[block_size, 2 * head_dim]``, K then V. All heads of
    the layer, full and streaming, are addressed from one base pointer with an offset per head.
    """

    base: Tensor  # cache of the first head; keeps the memory alive, gives dtype and device
    caches: tuple[Tensor, ...]  # of all heads, kept alive; none where they are one tensor
    offsets_H: Tensor  # int64, from `base`, in units of `OFFSET_UNIT` elements
    streaming_H: Tensor  # int32, 1 for a streaming head, 0 for a full head
    num_full: int
    block_size: int
    strides: tuple[int, int]  # elements between two blocks, and between two tokens of a block

    @property
    def num_heads(self) -> int:
        """KV heads of the layer on this rank."""
        return len(self.offsets_H)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """Tensor arguments of all kernels."""
        return self.base, self.offsets_H, self.streaming_H

    @classmethod
    def of(cls, caches: Sequence[Tensor], streaming: Sequence[bool]) -> LayerCache:
        """Build the table that the kernels read; not inside a CUDA graph.

        Args:
            caches: one per local KV head, in head order, ``[blocks, block_size, 2 * head_dim]``;
                the last dimension is dense and all strides agree.
            streaming: per head, whether it is a streaming head.

        Raises:
            ValueError: the caches differ in shape, stride, type or device, or are not aligned.
        """
        first = caches[0]

        def layout(cache: Tensor) -> str:
            shape = ", ".join(map(str, cache.shape[1:]))
            return f"[blocks, {shape}], strides {cache.stride()}, {cache.dtype} on {cache.device}"

        for i, cache in enumerate(caches):
            if layout(cache) != layout(first):
                raise ValueError(f"head cache {i} is {layout(cache)}; head 0 is {layout(first)}")
        if first.stride(2) != 1:
            raise ValueError(f"the last dimension of a head cache has stride {first.stride(2)}")
        if len(caches) != len(streaming):
            raise ValueError(f"{len(caches)} head caches, {len(streaming)} kinds")
        unit = OFFSET_UNIT * first.element_size()
        distances = [cache.data_ptr() - first.data_ptr() for cache in caches]
        strides = (first.stride(0), first.stride(1))
        if any(distance % unit for distance in distances) or any(s % OFFSET_UNIT for s in strides):
            raise ValueError(
                f"head caches must lie and be strided by multiples of {OFFSET_UNIT} elements, "
                f"strides are {strides}"
            )
        return cls(
            base=first,
            caches=tuple(caches),
            offsets_H=torch.tensor([d // unit for d in distances]).to(first.device),
            streaming_H=torch.tensor(list(streaming), dtype=torch.int32).to(first.device),
            num_full=sum(not kind for kind in streaming),
            block_size=first.shape[1],
            strides=strides,
        )

    @classmethod
    def of_whole(cls, cache_BHNC: Tensor, offsets_H: Tensor, streaming_H: Tensor) -> LayerCache:
        """The cache of a layer as stock vLLM binds it; looks at no tensor, so for every step.

        Args:
            cache_BHNC: ``[blocks, heads, block_size, 2 * head_dim]``, tokens outside of heads.
            offsets_H: as the attribute.
            streaming_H: as the attribute.

        Raises:
            ValueError: the heads of a token do not follow each other.
        """
        _, num_heads, block_size, row = cache_BHNC.shape
        if cache_BHNC.stride()[1:] != (row, num_heads * row, 1):
            raise ValueError(
                f"a cache of {num_heads} heads and rows of {row} must have its tokens outside of "
                f"its heads (layout LBNHC), its strides are {cache_BHNC.stride()}"
            )
        return cls(
            base=cache_BHNC,
            caches=(),
            offsets_H=offsets_H,
            streaming_H=streaming_H,
            num_full=0,
            block_size=block_size,
            strides=(cache_BHNC.stride(0), num_heads * row),
        )
