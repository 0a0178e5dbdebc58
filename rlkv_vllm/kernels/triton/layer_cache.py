"""What the GPU kernels know of a layer's cache: where each KV head's pages lie, and its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Head offsets are kept in units of so many elements, so that the compiler can prove
#: that rows are aligned and load them in 16-byte pieces.
OFFSET_UNIT = 16


@dataclass(frozen=True)
class LayerCache:
    """The head caches of one attention layer on one rank.

    One page is one KV head times one block, ``[block_size, 2 * head_dim]``, K then V. All heads
    of the layer, full and streaming, are addressed from one base pointer with an offset per head.

    Attributes:
        base: cache of the first head; keeps the memory alive and gives dtype and device.
        caches: the caches of all heads, kept alive; none where they are one tensor.
        offsets_H: int64, offset of each head from ``base`` in units of ``OFFSET_UNIT`` elements.
        streaming_H: int32, 1 for a streaming head, 0 for a full head.
        num_full: number of full heads.
        block_size: tokens per block.
        head_dim: head dimension.
        block_stride: elements between two blocks of a head.
        slot_stride: elements between two tokens of a block.
    """

    base: torch.Tensor
    caches: tuple[torch.Tensor, ...]
    offsets_H: torch.Tensor
    streaming_H: torch.Tensor
    num_full: int
    block_size: int
    head_dim: int
    block_stride: int
    slot_stride: int

    @property
    def num_heads(self) -> int:
        """KV heads of the layer on this rank."""
        return len(self.offsets_H)

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], streaming: Sequence[bool]) -> LayerCache:
        """Build the table that the kernels read; not inside a CUDA graph.

        Args:
            caches: one per local KV head, in head order, ``[blocks, block_size, 2 * head_dim]``;
                the last dimension is dense and all strides agree.
            streaming: per head, whether it is a streaming head.

        Raises:
            ValueError: the caches differ in shape, stride, type or device, or are not aligned.
        """
        first = caches[0]
        alike = (first.shape[1:], first.stride(), first.dtype, first.device)
        for i, cache in enumerate(caches):
            if (cache.shape[1:], cache.stride(), cache.dtype, cache.device) != alike:
                raise ValueError(
                    f"head cache {i} is {tuple(cache.shape)}, strides {cache.stride()}, "
                    f"{cache.dtype} on {cache.device}; head 0 is {tuple(first.shape)}, strides "
                    f"{first.stride()}, {first.dtype} on {first.device}"
                )
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
            offsets_H=torch.tensor(
                [distance // unit for distance in distances], dtype=torch.int64
            ).to(first.device),
            streaming_H=torch.tensor(list(streaming), dtype=torch.int32).to(first.device),
            num_full=sum(not kind for kind in streaming),
            block_size=first.shape[1],
            head_dim=first.shape[2] // 2,
            block_stride=first.stride(0),
            slot_stride=first.stride(1),
        )

    @classmethod
    def of_whole(
        cls, cache_BHNC: torch.Tensor, offsets_H: torch.Tensor, streaming_H: torch.Tensor
    ) -> LayerCache:
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
            head_dim=row // 2,
            block_stride=cache_BHNC.stride(0),
            slot_stride=num_heads * row,
        )
