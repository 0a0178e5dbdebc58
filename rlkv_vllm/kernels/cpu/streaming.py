"""Streaming-head attention in plain torch for any sink, batched over requests and heads of a layer.

The CPU backend takes it where :mod:`rlkv_vllm.kernels.cpu.ring_tiles` does not serve the sink.

Two parts: :func:`plan_step` turns a step's block table and lengths into index
tensors, once per step; :func:`streaming_attention` runs one layer with them.

Shape suffixes: N tokens of the step, R decode requests, K keys of a decode
request, P tiles of the prefill, T query tokens of a tile, S keys of a tile,
H streaming KV heads of the layer, G query heads per KV head, D head_dim.

Rules that the index tensors keep (each was a wrong answer once):

* A key that is out of the window, or that the request does not own, is never
  loaded: freed entries of a block table keep stale ids, and ``0 * NaN`` is NaN.
  Masked positions point at a token of the request itself instead.
* Positions whose block was never allocated (lean prefill) are not written.
* All tokens of the step are written before any is read: a request may hit
  blocks that another request of the same step is filling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

#: Bytes that a prefill may take at once for gathered keys and values.
_SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class DecodeIndex:
    """Requests with one new token: every visible key is in the cache."""

    rows_R: torch.Tensor  # row of the request's token in the step
    slots_RK: torch.Tensor  # cache slots of the keys, flat: R * K
    visible_R1K: torch.Tensor | None  # bool [R, 1, K]; None: every key is visible


@dataclass(frozen=True)
class PrefillIndex:
    """Requests with several new tokens, cut into tiles of T queries.

    Keys are taken from a source that holds the cached keys of all the
    requests first (``old_slots``) and the step's own tokens after them.
    """

    old_slots: torch.Tensor  # cache slots of sinks and windows before the chunks
    rows_PT: torch.Tensor  # query rows in the step; the last tile repeats its last row
    keys_PS: torch.Tensor  # indices into the source
    visible_PTS: torch.Tensor  # bool [P, T, S]
    out_rows: torch.Tensor  # rows of the step that the tiles answer
    out_index: torch.Tensor  # their places in the flattened [P * T]


@dataclass(frozen=True)
class StepPlan:
    """Index tensors of one step for one ring block table, shared by its layers."""

    write_rows: torch.Tensor | None  # rows with a slot of their own; None: all rows
    write_slots: torch.Tensor
    decode: DecodeIndex | None
    prefill: PrefillIndex | None


def prefill_tile(window: int) -> int:
    """Queries per tile: wide enough to amortise the band, narrow enough not to waste it."""
    return max(32, min(128, window))


def plan_step(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    block_size: int,
    sink: int,
    window: int,
    null_block: int = 0,
) -> StepPlan:
    """Index tensors for all streaming heads that read ``block_table``.

    Args:
        block_table: ``[requests, max blocks]``, entry ``i`` holds positions
            ``i * block_size ..``; entries out of the window may be stale.
        seq_lens: ``[requests]`` tokens after this step, new ones included.
        query_start_loc: ``[requests + 1]`` first row of each request.
        slot_mapping: ``[N]`` slot of each new token; tokens that are out of the
            window when the chunk ends map into the null block.
        block_size: tokens per block.
        sink: first tokens kept.
        window: last tokens kept, the query's own included.
        null_block: id of the block that nobody owns.
    """
    starts = query_start_loc[:-1].long()
    lens_q = (query_start_loc[1:] - query_start_loc[:-1]).long()
    ends = seq_lens.long()
    slots = slot_mapping.long()
    owned = slots >= (null_block + 1) * block_size
    if bool(owned.all()):
        write_rows, write_slots = None, slots
    else:
        write_rows = owned.nonzero().squeeze(1)
        write_slots = slots[write_rows]

    def cache_slots(requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = block_table[requests, positions // block_size].long()
        return blocks * block_size + positions % block_size

    decode_requests = (lens_q == 1).nonzero().squeeze(1)
    prefill_requests = (lens_q > 1).nonzero().squeeze(1)
    decode = prefill = None
    if decode_requests.numel():
        decode = _plan_decode(decode_requests, starts, ends, cache_slots, sink=sink, window=window)
    if prefill_requests.numel():
        prefill = _plan_prefill(
            prefill_requests, starts, lens_q, ends, cache_slots, sink=sink, window=window
        )
    return StepPlan(write_rows, write_slots, decode, prefill)


_CacheSlots = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _plan_decode(
    requests: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    cache_slots: _CacheSlots,
    *,
    sink: int,
    window: int,
) -> DecodeIndex:
    last_R1 = (ends[requests] - 1)[:, None]
    num_keys = min(sink + window, int(last_R1.max()) + 1)
    num_sinks = min(sink, num_keys)
    slot_K = torch.arange(num_keys)
    # [0, sinks) are the first tokens, the rest is the window, right-aligned on the query.
    position_RK = torch.where(slot_K < num_sinks, slot_K, last_R1 - (num_keys - 1) + slot_K)
    visible_RK = (position_RK <= last_R1) & ((slot_K < num_sinks) | (position_RK >= num_sinks))
    position_RK = torch.where(visible_RK, position_RK, last_R1)
    slots_RK = cache_slots(requests[:, None].expand_as(position_RK), position_RK)
    all_visible = bool(visible_RK.all())
    return DecodeIndex(
        starts[requests],
        slots_RK.reshape(-1),
        None if all_visible else visible_RK[:, None, :],
    )


def _plan_prefill(
    requests: torch.Tensor,
    starts: torch.Tensor,
    lens_q: torch.Tensor,
    ends: torch.Tensor,
    cache_slots: _CacheSlots,
    *,
    sink: int,
    window: int,
) -> PrefillIndex:
    first_M = ends[requests] - lens_q[requests]  # position of the chunk's first token
    num_new_M = lens_q[requests]
    start_M = starts[requests]

    # Cached keys: sinks and window before the chunk, side by side for all requests.
    num_sinks_M = first_M.clamp(max=sink)
    window_from_M = (first_M - window + 1).clamp(min=0).maximum(num_sinks_M)
    num_window_M = first_M - window_from_M
    num_old_M = num_sinks_M + num_window_M
    old_base_M = num_old_M.cumsum(0) - num_old_M
    num_old = int(num_old_M.sum())
    old_request = torch.repeat_interleave(torch.arange(len(requests)), num_old_M)
    within = torch.arange(num_old) - old_base_M[old_request]
    is_sink = within < num_sinks_M[old_request]
    old_position = torch.where(
        is_sink, within, within - num_sinks_M[old_request] + window_from_M[old_request]
    )
    old_slots = cache_slots(requests[old_request], old_position)

    # Tiles of T queries.
    tile = prefill_tile(window)
    tiles_M = (num_new_M + tile - 1) // tile
    request_P = torch.repeat_interleave(torch.arange(len(requests)), tiles_M)
    tile_P = torch.arange(len(request_P)) - (tiles_M.cumsum(0) - tiles_M)[request_P]
    offset_PT = tile_P[:, None] * tile + torch.arange(tile)
    real_PT = offset_PT < num_new_M[request_P][:, None]
    offset_PT = offset_PT.minimum(num_new_M[request_P][:, None] - 1)
    rows_PT = start_M[request_P][:, None] + offset_PT
    q_position_PT = first_M[request_P][:, None] + offset_PT

    # Keys of a tile: all sinks, then the band of its queries.
    band = window - 1 + tile
    band_from_P1 = first_M[request_P][:, None] + tile_P[:, None] * tile - (window - 1)
    k_position_PS = torch.cat(
        [
            torch.arange(sink).expand(len(request_P), sink),
            band_from_P1 + torch.arange(band),
        ],
        dim=1,
    )
    in_band_S = torch.arange(sink + band) >= sink
    first_P1 = first_M[request_P][:, None]
    end_P1 = first_P1 + num_new_M[request_P][:, None]
    valid_PS = (k_position_PS < end_P1) & (~in_band_S | (k_position_PS >= sink))
    visible_PTS = (
        valid_PS[:, None, :]
        & (k_position_PS[:, None, :] <= q_position_PT[:, :, None])
        & (~in_band_S | (k_position_PS[:, None, :] > q_position_PT[:, :, None] - window))
    )
    # Where a key lies in the source: cached sink, cached window, or row of the step.
    is_old_PS = k_position_PS < first_P1
    sinks_P1 = num_sinks_M[request_P][:, None]
    old_PS = old_base_M[request_P][:, None] + torch.where(
        k_position_PS < sinks_P1,
        k_position_PS,
        k_position_PS - window_from_M[request_P][:, None] + sinks_P1,
    )
    new_PS = num_old + start_M[request_P][:, None] + (k_position_PS - first_P1)
    own_P1 = num_old + rows_PT[:, :1]  # never masked out of its own tile: always safe
    seen_PS = visible_PTS.any(1)
    keys_PS = torch.where(seen_PS, torch.where(is_old_PS, old_PS, new_PS), own_P1)
    return PrefillIndex(
        old_slots,
        rows_PT,
        keys_PS,
        visible_PTS,
        rows_PT[real_PT],
        real_PT.reshape(-1).nonzero().squeeze(1),
    )


def streaming_attention(
    plan: StepPlan,
    cache_HSD: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """One layer's streaming heads: write the step's KV, then attend.

    A query sees every key as the cache holds it, also those of its own step: an answer does
    not depend on how its prompt was cut into chunks.

    Args:
        plan: from :func:`plan_step`, of the block table of these heads.
        cache_HSD: ``[H, slots, 2 * D]`` view on the cache, K then V; of the type of the
            keys or of 8-bit floats.
        query: ``[N, H, G, D]``.
        key: ``[N, H, D]``.
        value: ``[N, H, D]``.
        output: ``[N, H, G, D]``, written at the rows of the plan's requests.
        scale: factor on ``q @ k``.
        k_scale: what a key in the cache stands for, a number that it is to be multiplied by.
        v_scale: the same of a value.
    """
    if cache_HSD.dtype == key.dtype:
        kv_HND = torch.cat([key, value], dim=-1).transpose(0, 1)
        writable = cache_HSD
    else:
        most = torch.finfo(cache_HSD.dtype).max
        scaled = torch.cat([key / k_scale, value / v_scale], dim=-1).clamp(-most, most)
        kv_HND = scaled.transpose(0, 1).to(cache_HSD.dtype)
        writable = cache_HSD.view(torch.uint8)  # torch copies no 8-bit floats by index
    written = kv_HND if plan.write_rows is None else kv_HND[:, plan.write_rows]
    writable.index_copy_(1, plan.write_slots, written.view(writable.dtype))
    scales = (scale * k_scale, v_scale)
    if plan.decode is not None:
        _decode(plan.decode, cache_HSD, query, output, scales)
    if plan.prefill is not None:
        _prefill(plan.prefill, cache_HSD, kv_HND, query, output, scales)


def _attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    visible: torch.Tensor | None,
    scales: tuple[float, float],
) -> torch.Tensor:
    """q [H, B, G*T, D], kv [H, B, S, 2D], visible bool, broadcastable to [B, G*T, S]."""
    d = q.shape[-1]
    kv = kv.to(q.dtype)  # 8-bit floats
    on_scores, on_values = scales
    out = scaled_dot_product_attention(
        q, kv[..., :d], kv[..., d:], attn_mask=visible, scale=on_scores
    )
    return out if on_values == 1 else out.mul_(on_values)


def _decode(
    index: DecodeIndex,
    cache_HSD: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    scales: tuple[float, float],
) -> None:
    _, num_heads, _group, d = query.shape
    num_requests = len(index.rows_R)
    kv = cache_HSD.index_select(1, index.slots_RK)
    kv_HRKD = kv.view(num_heads, num_requests, -1, 2 * d)
    q_HRGD = query.index_select(0, index.rows_R).transpose(0, 1)
    out_HRGD = _attend(q_HRGD, kv_HRKD, index.visible_R1K, scales)
    output.index_copy_(0, index.rows_R, out_HRGD.transpose(0, 1))


def _prefill(
    index: PrefillIndex,
    cache_HSD: torch.Tensor,
    kv_HND: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    scales: tuple[float, float],
) -> None:
    _, num_heads, group, d = query.shape
    num_tiles, tile = index.rows_PT.shape
    source = torch.cat([cache_HSD.index_select(1, index.old_slots), kv_HND], dim=1)
    out = torch.empty(num_tiles, tile, num_heads, group, d, dtype=output.dtype)
    keys = index.keys_PS.shape[1]
    tile_bytes = num_heads * keys * 2 * d * source.element_size()
    tiles_per_slab = max(1, _SLAB_BYTES // tile_bytes)
    for a in range(0, num_tiles, tiles_per_slab):
        b = min(a + tiles_per_slab, num_tiles)
        keys_PS = index.keys_PS[a:b]
        kv = source.index_select(1, keys_PS.reshape(-1))
        kv_HPSD = kv.view(num_heads, b - a, -1, 2 * d)
        q = query.index_select(0, index.rows_PT[a:b].reshape(-1))
        q_HPGTD = q.view(b - a, tile, num_heads, group, d).permute(2, 0, 3, 1, 4)
        visible = index.visible_PTS[a:b].repeat(1, group, 1)
        o = _attend(q_HPGTD.reshape(num_heads, b - a, group * tile, d), kv_HPSD, visible, scales)
        out[a:b] = o.view(num_heads, b - a, group, tile, d).permute(1, 3, 0, 2, 4)
    flat = out.view(num_tiles * tile, num_heads, group, d)
    output.index_copy_(0, index.out_rows, flat.index_select(0, index.out_index))
