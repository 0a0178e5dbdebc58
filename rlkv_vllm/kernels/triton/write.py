"""Cache write: one launch puts K and V of all heads of a layer into their pages.

Shape suffixes: N tokens of the step, H KV heads, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT, LayerCache

_TOKENS_PER_PROGRAM = 16


# Any number of tokens is one kernel: nothing may be compiled while serving.
@triton.jit(do_not_specialize=["num_tokens"])
def write_kernel(
    key,
    value,
    cache,
    head_offsets,
    head_streaming,
    full_slots,
    ring_slots,
    num_tokens,
    key_stride_n,
    key_stride_h,
    value_stride_n,
    value_stride_h,
    block_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    OFFSET_UNIT: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (tile of tokens, KV head)."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D_PAD)
    if tl.load(head_streaming + head) != 0:
        slots = tl.load(ring_slots + rows, mask=rows < num_tokens, other=-1)
    else:
        slots = tl.load(full_slots + rows, mask=rows < num_tokens, other=-1)
    # Padding has slot -1; a position that lean prefill does not keep lies in the null block.
    owned = slots >= BLOCK_SIZE
    mask = owned[:, None] & (d < D)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    k = tl.load(key + rows64 * key_stride_n + head * key_stride_h + d[None, :], mask=mask)
    v = tl.load(value + rows64 * value_stride_n + head * value_stride_h + d[None, :], mask=mask)
    pages = cache + tl.load(head_offsets + head) * OFFSET_UNIT
    slots64 = slots.to(tl.int64)
    to = (slots64 // BLOCK_SIZE) * block_stride + (slots64 % BLOCK_SIZE) * slot_stride
    tl.store(pages + to[:, None] + d[None, :], k, mask=mask)
    tl.store(pages + to[:, None] + D + d[None, :], v, mask=mask)


def write_cache(
    key_NHD: Tensor,
    value_NHD: Tensor,
    cache: LayerCache,
    full_slots_N: Tensor,
    ring_slots_N: Tensor,
) -> None:
    """Write a step's keys and values into the pages of all heads.

    Args:
        key_NHD: keys of the step's tokens, dense in the last dimension.
        value_NHD: values, as the keys.
        cache: the layer's cache.
        full_slots_N: int64, slot of each token in a full head's pages; below ``block_size``
            (padding, null block): not written.
        ring_slots_N: the same for streaming heads.
    """
    n, num_heads, head_dim = key_NHD.shape
    if n == 0:
        return
    write_kernel[(triton.cdiv(n, _TOKENS_PER_PROGRAM), num_heads)](
        key_NHD,
        value_NHD,
        *cache.heads,
        full_slots_N,
        ring_slots_N,
        n,
        *key_NHD.stride()[:2],
        *value_NHD.stride()[:2],
        *cache.strides,
        BLOCK_SIZE=cache.block_size,
        OFFSET_UNIT=OFFSET_UNIT,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK_T=_TOKENS_PER_PROGRAM,
        num_warps=4,
    )
