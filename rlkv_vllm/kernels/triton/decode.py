"""Decode: one launch for all requests with one new token and all heads of a layer.

The rows of a tile are the query heads of a KV head. Visible keys are numbered without the gap
between sinks and window, so no masked key is loaded. The keys of a full head are spread over
splits, whose partial results a second launch merges. Split 0 of a gated head is local attention,
the others share the gap: all splits together are full attention.

Shape suffixes: R requests, Q query heads, S splits, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT, LayerCache, StepRequests
from rlkv_vllm.kernels.triton.tile import attend_tile, head_view, load_tile, page_rows

#: Programs per multiprocessor that a decode launch aims for: about two waves of two.
PROGRAMS_PER_SM = 4
#: A full head is not cut into pieces of fewer tiles than this.
MIN_TILES_PER_SPLIT = tl.constexpr(4)
MAX_SPLITS = 64
#: Rows of the smallest matrix product that the tensor cores do.
MIN_ROWS = 16
#: Compute capability of no device: Triton's interpreter, where fewer and wider tiles are faster.
INTERPRETER = 0


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters."""

    block_n: int  # keys per tile
    num_warps: int
    num_stages: int  # tiles of keys in flight


def decode_config(head_dim: int, itemsize: int) -> DecodeConfig:
    """Launch parameters by the bytes of a row: about 32 KiB of keys and values per tile.

    A page lookup takes two of the stages, so five keep two tiles of keys in flight.
    """
    row = triton.next_power_of_2(head_dim) * itemsize
    return DecodeConfig(block_n=max(16, min(64, 16384 // row)), num_warps=4, num_stages=5)


@triton.jit
def key_range(seq_len, sink, window):
    """Visible keys of the last token, numbered without a gap.

    Returns:
        ``(num_keys, num_sinks, skip)``: key ``j`` stands at position ``j`` if
        ``j < num_sinks`` else ``j + skip``.
    """
    num_sinks = tl.minimum(sink, seq_len)
    first = tl.maximum(seq_len - window, num_sinks)
    return num_sinks + seq_len - first, num_sinks, first - num_sinks


@triton.jit
def keys_per_split(num_keys, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that one split of a full head takes."""
    tiles = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), NUM_SPLITS)
    return tl.maximum(tiles, MIN_TILES_PER_SPLIT) * BLOCK_N


@triton.jit
def gap_of(gates, head, skip):
    """Keys between sinks and window that a gated head reads: none if it is closed."""
    return tl.where(tl.load(gates + head) == 0, 0, skip)


@triton.jit
def decode_kernel(
    query,
    output,
    partial_output,
    partial_lse,
    cache,
    head_offsets,
    head_streaming,
    gates,
    full_table,
    ring_table,
    query_start,
    seq_lens,
    query_stride_n,
    query_stride_h,
    output_stride_n,
    output_stride_h,
    full_stride,
    ring_stride,
    block_stride,
    slot_stride,
    sink,
    window,
    scale_log2,
    NUM_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OFFSET_UNIT: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (KV split, KV head, request)."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    row = tl.load(query_start + request)
    if tl.load(query_start + request + 1) - row != 1:
        return  # prefill, or padding of a CUDA graph
    seq_len = tl.load(seq_lens + request)
    streaming = tl.load(head_streaming + head) != 0
    table, sink, window = head_view(
        request, streaming, full_table, ring_table, full_stride, ring_stride, seq_len, sink, window
    )
    num_keys, num_sinks, skip = key_range(seq_len, sink, window)
    per_split = num_keys if streaming else keys_per_split(num_keys, NUM_SPLITS, BLOCK_N)
    begin = split * per_split
    is_alone = per_split >= num_keys
    if gates is not None:
        between = gap_of(gates, head, skip)
        is_alone = between == 0
        if split > 0:
            per_split = keys_per_split(between, NUM_SPLITS - 1, BLOCK_N)
            begin = (split - 1) * per_split
            num_keys, num_sinks, skip = between, 0, num_sinks
    end = tl.minimum(begin + per_split, num_keys)
    if begin >= end:
        return

    g = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    in_d = d < D
    rows_mask = (g < GROUP)[:, None] & in_d[None, :]
    heads = head * GROUP + g
    q = tl.load(
        query + row.to(tl.int64) * query_stride_n + heads[:, None] * query_stride_h + d[None, :],
        mask=rows_mask,
        other=0.0,
    )
    pages = cache + tl.load(head_offsets + head) * OFFSET_UNIT
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_split = j < end
        position = tl.where(j < num_sinks, j, j + skip)
        at = page_rows(table, position, in_split, block_stride, slot_stride, BLOCK_SIZE)
        k, v = load_tile(pages, pages + D, at, at, in_split, d, in_d)
        m, norm, acc = attend_tile(q, k, v, in_split[None, :], m, norm, acc, scale_log2)

    acc = acc / norm[:, None]
    if is_alone:
        to = output + row.to(tl.int64) * output_stride_n + heads[:, None] * output_stride_h
        tl.store(to + d[None, :], acc.to(output.dtype.element_ty), mask=rows_mask)
    else:
        at_row = (request * tl.num_programs(1) * GROUP + heads).to(tl.int64) * NUM_SPLITS + split
        tl.store(partial_output + at_row[:, None] * D + d[None, :], acc, mask=rows_mask)
        tl.store(partial_lse + at_row, m + tl.log2(norm), mask=g < GROUP)


@triton.jit
def merge_kernel(
    output,
    partial_output,
    partial_lse,
    head_streaming,
    gates,
    query_start,
    seq_lens,
    output_stride_n,
    output_stride_h,
    sink,
    window,
    NUM_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (query head, request): partial results of a full or gated head become one."""
    q_head = tl.program_id(0)
    request = tl.program_id(1)
    row = tl.load(query_start + request)
    if tl.load(query_start + request + 1) - row != 1:
        return
    head = q_head // GROUP
    num_keys = tl.load(seq_lens + request)
    if gates is not None:
        _, _, skip = key_range(num_keys, sink, window)
        between = gap_of(gates, head, skip)
        used = 1 + tl.cdiv(between, keys_per_split(between, NUM_SPLITS - 1, BLOCK_N))
    else:
        if tl.load(head_streaming + head) != 0:
            return
        used = tl.cdiv(num_keys, keys_per_split(num_keys, NUM_SPLITS, BLOCK_N))
    if used == 1:
        return  # one split did it all
    s = tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, D_PAD)
    first_row = (request * tl.num_programs(0) + q_head).to(tl.int64) * NUM_SPLITS
    at_row = first_row + s
    lse = tl.load(partial_lse + at_row, mask=s < used, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    # Partials of splits that were not used hold whatever lay there before: never loaded.
    part = tl.load(
        partial_output + at_row[:, None] * D + d[None, :],
        mask=(s < used)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    total = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    if gates is not None:
        gate = tl.load(gates + head)
        local = tl.load(partial_output + first_row * D + d, mask=d < D, other=0.0)
        total = gate * total + (1 - gate) * local
    to = output + row.to(tl.int64) * output_stride_n + q_head * output_stride_h
    tl.store(to + d, total.to(output.dtype.element_ty), mask=d < D)


def num_splits(
    num_requests: int, num_full: int, target_programs: int, *, gated: bool = False
) -> int:
    """Splits of a full or gated head: enough programs for the device, a power of two.

    Depends on the shapes of the batch only, so that a CUDA graph can hold the launch.
    """
    if num_full == 0:
        return 1
    wanted = triton.cdiv(target_programs, num_requests * num_full)
    # One split of a gated head is what local attention sees.
    return min(triton.next_power_of_2(max(wanted, 1 + gated)), MAX_SPLITS)


@dataclass(frozen=True)
class Workspace:
    """Partial results of split-KV decode; allocated once, shared by all layers of a rank."""

    output: Tensor  # float32, room for [R, Q, S, D] of any batch
    lse: Tensor  # float32, room for [R, Q, S]
    target_programs: int  # that a launch aims for
    capability: int  # compute capability of the device, e.g. 90; `INTERPRETER` without one

    @classmethod
    def of(
        cls,
        *,
        max_requests: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        gated: bool = False,
        target_programs: int | None = None,
        capability: int | None = None,
    ) -> Workspace:
        """Allocate for steps of up to ``max_requests`` requests, padding of CUDA graphs included.

        Heads are those of a layer on this rank. ``target_programs`` and ``capability`` are given,
        both, where the device is no GPU or another one.
        """
        if target_programs is None or capability is None:
            properties = torch.cuda.get_device_properties(device)
            target_programs = PROGRAMS_PER_SM * properties.multi_processor_count
            capability = 10 * properties.major + properties.minor
        rows = num_q_heads * max(
            requests * num_splits(requests, full, target_programs, gated=gated)
            for requests in range(1, max_requests + 1)
            for full in range(1, num_kv_heads + 1)
        )
        return cls(
            output=torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            lse=torch.empty(rows, dtype=torch.float32, device=device),
            target_programs=target_programs,
            capability=capability,
        )


def decode(
    query_NQD: Tensor,
    output_NQD: Tensor,
    cache: LayerCache,
    step: StepRequests,
    *,
    workspace: Workspace,
    config: DecodeConfig,
) -> None:
    """Attention of all requests with exactly one new token; see :func:`split_attention`."""
    num_requests = step.seq_lens.shape[0]
    num_q_heads, head_dim = query_NQD.shape[1:]
    gated = step.gates_H is not None
    num_cut = cache.num_heads if gated else cache.num_full
    splits = num_splits(num_requests, num_cut, workspace.target_programs, gated=gated)
    group = num_q_heads // cache.num_heads
    shared = {
        "NUM_SPLITS": splits,
        "GROUP": group,
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "BLOCK_N": config.block_n,
    }
    decode_kernel[(splits, cache.num_heads, num_requests)](
        query_NQD,
        output_NQD,
        workspace.output,
        workspace.lse,
        *cache.heads,
        *step.tensors,
        *query_NQD.stride()[:2],
        *output_NQD.stride()[:2],
        *step.scalars(cache),
        ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_SIZE=cache.block_size,
        OFFSET_UNIT=OFFSET_UNIT,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    if splits == 1:
        return
    merge_kernel[(num_q_heads, num_requests)](
        output_NQD,
        workspace.output,
        workspace.lse,
        cache.streaming_H,
        step.gates_H,
        step.query_start_loc,
        step.seq_lens,
        *output_NQD.stride()[:2],
        step.sink,
        step.window,
        num_warps=4,
        **shared,
    )
