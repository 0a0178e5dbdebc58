"""Streaming heads in plain torch for any sink, batched over requests and heads of a layer.

The CPU backend uses it where :mod:`rlkv_vllm.kernels.cpu.ring_tiles` does not support the sink.

Shape suffixes: N tokens of the step, R decode requests, K keys of a decode request, M prefill
requests, P tiles of the prefill, T query tokens of a tile, S keys of a tile, H streaming KV heads
of the layer, G query heads per KV head, D head_dim.

Rules for the index tensors (each was a wrong answer once):

* A key that is out of the window, or that the request does not own, is never loaded: freed entries
  of a block table keep stale ids, and ``0 * NaN`` is NaN. Masked positions point at a token of the
  request itself instead.
* Positions whose block was never allocated (lean prefill) are not written.
* All tokens of the step are written before any is read: a request may hit blocks that another
  request of the same step fills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlkv_vllm.kernels.cpu.step import StreamingStep

#: Bytes that a prefill may take at once for gathered keys and values.
_SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class DecodeIndex:
    """Requests with one new token: every visible key is in the cache."""

    rows_R: Tensor  # row of the request's token in the step
    slots_RK: Tensor  # cache slots of the keys, flat: R * K
    visible_R1K: Tensor | None  # bool [R, 1, K]; None: every key is visible


@dataclass(frozen=True)
class PrefillIndex:
    """Requests with several new tokens, cut into tiles of T queries.

    Keys are read from a source that holds the cached keys of all requests (``old_slots``), then the
    step's own tokens.
    """

    old_slots: Tensor  # cache slots of sinks and windows before the chunks
    rows_PT: Tensor  # query rows in the step; the last tile repeats its last row
    keys_PS: Tensor  # indices into the source
    visible_PTS: Tensor  # bool
    out_rows: Tensor  # rows of the step that the tiles answer
    out_index: Tensor  # their places in the flattened [P * T]


@dataclass(frozen=True)
class StepPlan:
    """Index tensors of one step for one ring block table, shared by its layers."""

    write_rows: Tensor | None  # rows with a slot of their own; None: all rows
    write_slots: Tensor
    decode: DecodeIndex | None
    prefill: PrefillIndex | None


def prefill_tile(window: int) -> int:
    """Queries per tile: wide enough to amortise the band, narrow enough not to waste it."""
    return max(32, min(128, window))


def plan_step(step: StreamingStep) -> StepPlan:
    """Index tensors for all streaming heads that read the step's block table."""
    counts = step.query_start_loc[1:] - step.query_start_loc[:-1]
    write_rows, write_slots = None, step.slot_mapping.long()
    owned = write_slots >= step.block_size
    if not owned.all():
        write_rows = owned.nonzero().squeeze(1)
        write_slots = write_slots[write_rows]
    single, several = (found.nonzero().squeeze(1) for found in (counts == 1, counts > 1))
    return StepPlan(
        write_rows,
        write_slots,
        _plan_decode(step, single) if single.numel() else None,
        _plan_prefill(step, several) if several.numel() else None,
    )


def _cache_slots(step: StreamingStep, requests: Tensor, positions: Tensor) -> Tensor:
    blocks = step.block_table[requests, positions // step.block_size].long()
    return blocks * step.block_size + positions % step.block_size


def _plan_decode(step: StreamingStep, requests: Tensor) -> DecodeIndex:
    last_R1 = (step.seq_lens[requests].long() - 1)[:, None]
    num_keys = min(step.sink + step.window, int(last_R1.max()) + 1)
    num_sinks = min(step.sink, num_keys)
    slot_K = torch.arange(num_keys)
    # [0, sinks) are the first tokens, the rest is the window, right-aligned on the query.
    position_RK = torch.where(slot_K < num_sinks, slot_K, last_R1 - (num_keys - 1) + slot_K)
    visible_RK = (position_RK <= last_R1) & ((slot_K < num_sinks) | (position_RK >= num_sinks))
    position_RK = torch.where(visible_RK, position_RK, last_R1)
    return DecodeIndex(
        step.query_start_loc[requests].long(),
        _cache_slots(step, requests[:, None], position_RK).reshape(-1),
        None if visible_RK.all() else visible_RK[:, None, :],
    )


def _plan_prefill(step: StreamingStep, requests: Tensor) -> PrefillIndex:
    sink, window = step.sink, step.window
    request_M = torch.arange(len(requests))
    start_M = step.query_start_loc[requests].long()
    num_new_M = step.query_start_loc[requests + 1].long() - start_M
    first_M = step.seq_lens[requests].long() - num_new_M  # position of the chunk's first token

    # Cached keys: sinks and window before the chunk, side by side for all requests.
    num_sinks_M = first_M.clamp(max=sink)
    window_from_M = (first_M - window + 1).clamp(min=0).maximum(num_sinks_M)
    num_old_M = num_sinks_M + first_M - window_from_M
    old_base_M = num_old_M.cumsum(0) - num_old_M
    num_old = int(num_old_M.sum())
    owner = torch.repeat_interleave(request_M, num_old_M)
    within = torch.arange(num_old) - old_base_M[owner]
    gap_M = window_from_M - num_sinks_M
    old_position = torch.where(within < num_sinks_M[owner], within, within + gap_M[owner])
    old_slots = _cache_slots(step, requests[owner], old_position)

    # Tiles of T queries.
    tile = prefill_tile(window)
    tiles_M = (num_new_M + tile - 1) // tile
    request_P = torch.repeat_interleave(request_M, tiles_M)
    tile_P = torch.arange(len(request_P)) - (tiles_M.cumsum(0) - tiles_M)[request_P]

    def of_tile(values_M: Tensor) -> Tensor:
        return values_M[request_P][:, None]

    first_P1, num_new_P1 = of_tile(first_M), of_tile(num_new_M)
    offset_PT = tile_P[:, None] * tile + torch.arange(tile)
    real_PT = offset_PT < num_new_P1
    offset_PT = offset_PT.minimum(num_new_P1 - 1)
    rows_PT = of_tile(start_M) + offset_PT
    q_position_PT1 = (first_P1 + offset_PT)[:, :, None]

    # Keys of a tile: all sinks, then the band of its queries.
    band = window - 1 + tile
    band_from_P1 = first_P1 + tile_P[:, None] * tile - (window - 1)
    sinks_PS = torch.arange(sink).expand(len(request_P), sink)
    k_position_PS = torch.cat([sinks_PS, band_from_P1 + torch.arange(band)], dim=1)
    is_sink_S = torch.arange(sink + band) < sink
    valid_PS = (k_position_PS < first_P1 + num_new_P1) & (is_sink_S | (k_position_PS >= sink))
    k_position_P1S = k_position_PS[:, None, :]
    visible_PTS = (
        valid_PS[:, None, :]
        & (k_position_P1S <= q_position_PT1)
        & (is_sink_S | (k_position_P1S > q_position_PT1 - window))
    )
    # Where a key lies in the source: cached sink, cached window, or row of the step.
    in_sinks_PS = k_position_PS < of_tile(num_sinks_M)
    old_PS = of_tile(old_base_M) + k_position_PS - torch.where(in_sinks_PS, 0, of_tile(gap_M))
    new_PS = num_old + of_tile(start_M) + (k_position_PS - first_P1)
    source_PS = torch.where(k_position_PS < first_P1, old_PS, new_PS)
    own_P1 = num_old + rows_PT[:, :1]  # never masked out of its own tile: always safe
    return PrefillIndex(
        old_slots,
        rows_PT,
        torch.where(visible_PTS.any(1), source_PS, own_P1),
        visible_PTS,
        rows_PT[real_PT],
        real_PT.reshape(-1).nonzero().squeeze(1),
    )


def streaming_attention(
    plan: StepPlan,
    cache_HSD: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Streaming heads of one layer: write the step's keys and values, then attend.

    A query sees every key as the cache holds it, also those of its own step: an answer does not
    depend on how its prompt was cut into chunks.

    Args:
        plan: from :func:`plan_step`, of the block table of these heads.
        cache_HSD: ``[H, slots, 2 * D]`` view on the cache, K then V; of the type of the keys or of
            8-bit floats.
        query: ``[N, H, G, D]``.
        key: ``[N, H, D]``.
        value: ``[N, H, D]``.
        output: ``[N, H, G, D]``, written at the rows of the plan's requests.
        scale: factor on ``q @ k``.
        k_scale: factor that turns a cached key into a key.
        v_scale: the same for values.
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
        rows_R = plan.decode.rows_R
        kv = cache_HSD.index_select(1, plan.decode.slots_RK)
        kv_HRKD = kv.view(len(kv), len(rows_R), -1, kv.shape[-1])
        q_HRGD = query.index_select(0, rows_R).transpose(0, 1)
        out_HRGD = _attend(q_HRGD, kv_HRKD, plan.decode.visible_R1K, scales)
        output.index_copy_(0, rows_R, out_HRGD.transpose(0, 1))
    if plan.prefill is not None:
        _prefill(plan.prefill, cache_HSD, kv_HND, query, output, scales)


def _attend(q: Tensor, kv: Tensor, visible: Tensor | None, scales: tuple[float, float]) -> Tensor:
    """q [H, B, G*T, D], kv [H, B, S, 2D], visible bool, broadcastable to [B, G*T, S]."""
    key, value = kv.to(q.dtype).chunk(2, -1)  # from 8-bit floats
    on_scores, on_values = scales
    out = scaled_dot_product_attention(q, key, value, attn_mask=visible, scale=on_scores)
    return out if on_values == 1 else out.mul_(on_values)


def _prefill(
    index: PrefillIndex,
    cache_HSD: Tensor,
    kv_HND: Tensor,
    query: Tensor,
    output: Tensor,
    scales: tuple[float, float],
) -> None:
    _, num_heads, group, d = query.shape
    num_tiles, tile = index.rows_PT.shape
    source = torch.cat([cache_HSD.index_select(1, index.old_slots), kv_HND], dim=1)
    out = torch.empty(num_tiles, tile, num_heads, group, d, dtype=output.dtype)
    tile_bytes = num_heads * index.keys_PS.shape[1] * 2 * d * source.element_size()
    tiles_per_slab = max(1, _SLAB_BYTES // tile_bytes)
    for a in range(0, num_tiles, tiles_per_slab):
        b = min(a + tiles_per_slab, num_tiles)
        kv = source.index_select(1, index.keys_PS[a:b].reshape(-1))
        kv_HPSD = kv.view(num_heads, b - a, -1, 2 * d)
        q = query.index_select(0, index.rows_PT[a:b].reshape(-1))
        q_HPGTD = q.view(b - a, tile, num_heads, group, d).permute(2, 0, 3, 1, 4)
        visible = index.visible_PTS[a:b].repeat(1, group, 1)
        o = _attend(q_HPGTD.reshape(num_heads, b - a, group * tile, d), kv_HPSD, visible, scales)
        out[a:b] = o.view(num_heads, b - a, group, tile, d).permute(1, 3, 0, 2, 4)
    flat = out.view(num_tiles * tile, num_heads, group, d)
    output.index_copy_(0, index.out_rows, flat.index_select(0, index.out_index))
