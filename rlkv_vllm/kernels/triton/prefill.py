"""Prefill: causal for full heads, sinks and a window for streaming heads, in one launch.

The rows of a tile are queries of one request times the query heads of a KV head. Keys before the
chunk are read from the pages, those of the chunk from the step's inputs: lean prefill keeps no
pages for most of them. In both, visible keys are numbered without the gap between sinks and window.
A gated head goes on to the keys in the gap: local attention before is full attention after.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rlkv_vllm.kernels.triton.decode import INTERPRETER, gap_of
from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT, LayerCache, StepRequests
from rlkv_vllm.kernels.triton.tile import attend_tile, head_view, load_tile, page_rows


@dataclass(frozen=True)
class PrefillConfig:
    """Launch parameters."""

    block_m: int  # rows per tile, queries times padded query heads of a KV head
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int  # tiles of keys in flight


def prefill_config(
    head_dim: int, itemsize: int, capability: int, *, gated: bool = False
) -> PrefillConfig:
    """Launch parameters that keep the accumulators in registers, by the bytes of a row.

    `benchmarks/kernel_resources.py` shows it: wider tiles spill, but for the data center GPUs from
    sm_90 on, whose matrix instructions read from shared memory. Gated heads have two accumulators.
    """
    if capability == INTERPRETER:
        return PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)
    block_m, block_n = 128, 64 if 90 <= capability < 120 else 32
    if itemsize == 4:  # exact products without tensor cores: for checks, not for speed
        block_m, block_n = 32, 16
    elif triton.next_power_of_2(head_dim) * itemsize > 256:
        block_m, block_n = 64, 32
    return PrefillConfig(block_m // (1 + gated), block_n, num_warps=8, num_stages=2)


@triton.jit
def find_request(query_start, tile, num_requests, BLOCK_Q: tl.constexpr):
    """The request that owns a tile of queries.

    Request ``r`` owns tiles from ``query_start[r] // BLOCK_Q + r`` on: enough room for all its
    queries, known without looking at the other requests. Some tiles stay empty.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


# Any number of requests is one kernel: nothing may be compiled while serving.
@triton.jit(do_not_specialize=["num_requests"])
def prefill_kernel(
    query,
    key,
    value,
    output,
    cache,
    head_offsets,
    head_streaming,
    gates,
    full_table,
    ring_table,
    query_start,
    seq_lens,
    num_requests,
    query_stride_n,
    query_stride_h,
    key_stride_n,
    key_stride_h,
    value_stride_n,
    value_stride_h,
    output_stride_n,
    output_stride_h,
    full_stride,
    ring_stride,
    block_stride,
    slot_stride,
    sink,
    window,
    scale_log2,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OFFSET_UNIT: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (KV head, tile of queries)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_PAD
    head = tl.program_id(0)
    # The last tiles of a prompt see most keys: they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request = find_request(query_start, tile, num_requests, BLOCK_Q)
    start_row = tl.load(query_start + request)
    num_queries = tl.load(query_start + request + 1) - start_row
    if num_queries <= 1:
        return
    first_query = (tile - (start_row // BLOCK_Q + request)) * BLOCK_Q
    if first_query >= num_queries:
        return
    seq_len = tl.load(seq_lens + request)
    chunk = seq_len - num_queries  # position of the chunk's first token
    streaming = tl.load(head_streaming + head) != 0
    table, sink, window = head_view(
        request, streaming, full_table, ring_table, full_stride, ring_stride, seq_len, sink, window
    )
    m_index = tl.arange(0, BLOCK_M)
    query_index = first_query + m_index // GROUP_PAD
    g = m_index % GROUP_PAD
    heads = head * GROUP + g
    d = tl.arange(0, D_PAD)
    in_d = d < D
    row_mask = ((query_index < num_queries) & (g < GROUP))[:, None] & in_d[None, :]
    rows64 = (start_row + query_index).to(tl.int64)[:, None]
    q = tl.load(
        query + rows64 * query_stride_n + heads[:, None] * query_stride_h + d[None, :],
        mask=row_mask,
        other=0.0,
    )
    q_position = chunk + query_index
    first_position = chunk + first_query
    last_position = chunk + tl.minimum(first_query + BLOCK_Q, num_queries) - 1
    num_sinks = tl.minimum(sink, last_position + 1)

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    pages = cache + tl.load(head_offsets + head) * OFFSET_UNIT
    chunk_key = key + start_row.to(tl.int64) * key_stride_n + head * key_stride_h
    chunk_value = value + start_row.to(tl.int64) * value_stride_n + head * value_stride_h
    # Keys that some query of the tile sees: [0, first) and [low, high).
    first = num_sinks
    low = tl.maximum(first_position - window + 1, num_sinks)
    high = last_position + 1
    PASSES: tl.constexpr = 1 if gates is None else 2
    for between in tl.static_range(PASSES):
        if between:
            local = acc / norm[:, None]
            first = 0
            low = num_sinks
            high = low + gap_of(gates, head, tl.maximum(last_position - window + 1 - low, 0))

        # Before the chunk: from the pages.
        old_first = tl.minimum(first, chunk)
        num_old = old_first + tl.maximum(tl.minimum(high, chunk) - low, 0)
        for start in range(0, num_old, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            exists = j < num_old
            position = tl.where(j < old_first, j, j + low - old_first)
            at = page_rows(table, position, exists, block_stride, slot_stride, BLOCK_SIZE)
            k, v = load_tile(pages, pages + D, at, at, exists, d, in_d)
            in_window = position[None, :] > q_position[:, None] - window
            if between:
                visible = exists[None, :] & ~in_window
            else:
                visible = exists[None, :] & (in_window | (position < sink)[None, :])
            m, norm, acc = attend_tile(q, k, v, visible, m, norm, acc, scale_log2)

        # The chunk itself: from the step's inputs.
        new_first = tl.maximum(first - chunk, 0)
        new_low = tl.maximum(low, chunk)
        num_new = new_first + tl.maximum(high - new_low, 0)
        for start in range(0, num_new, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            exists = j < num_new
            index = tl.where(j < new_first, j, j + new_low - chunk - new_first)
            position = chunk + index
            index64 = index.to(tl.int64)
            key_rows, value_rows = index64 * key_stride_n, index64 * value_stride_n
            k, v = load_tile(chunk_key, chunk_value, key_rows, value_rows, exists, d, in_d)
            in_window = position[None, :] > q_position[:, None] - window
            if between:
                visible = exists[None, :] & ~in_window
            else:
                seen = position[None, :] <= q_position[:, None]
                visible = exists[None, :] & seen & (in_window | (position < sink)[None, :])
            m, norm, acc = attend_tile(q, k, v, visible, m, norm, acc, scale_log2)

    acc = acc / norm[:, None]
    if gates is not None:
        gate = tl.load(gates + head)
        acc = gate * acc + (1 - gate) * local
    to = output + rows64 * output_stride_n + heads[:, None] * output_stride_h
    tl.store(to + d[None, :], acc.to(output.dtype.element_ty), mask=row_mask)


def prefill(
    query_NQD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    output_NQD: Tensor,
    cache: LayerCache,
    step: StepRequests,
    *,
    config: PrefillConfig,
) -> None:
    """Attention of all requests with several new tokens; see :func:`split_attention`."""
    n, num_q_heads, head_dim = query_NQD.shape
    num_requests = step.seq_lens.shape[0]
    group = num_q_heads // cache.num_heads
    group_pad = triton.next_power_of_2(group)
    block_m = max(config.block_m, group_pad)
    num_tiles = n // (block_m // group_pad) + num_requests
    prefill_kernel[(cache.num_heads, num_tiles)](
        query_NQD,
        key_NHD,
        value_NHD,
        output_NQD,
        *cache.heads,
        *step.tensors,
        num_requests,
        *query_NQD.stride()[:2],
        *key_NHD.stride()[:2],
        *value_NHD.stride()[:2],
        *output_NQD.stride()[:2],
        *step.scalars(cache),
        GROUP=group,
        GROUP_PAD=group_pad,
        BLOCK_SIZE=cache.block_size,
        OFFSET_UNIT=OFFSET_UNIT,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
