"""Streaming heads on the CPU as dense paged attention over short block tables.

vLLM's C++ paged attention supports causal and sliding-window masks, but no sinks. Here a *tile*, up
to ``window`` consecutive query tokens of one request, becomes a request of its own with the table

    [window before the tile] [sinks] [the tile's own tokens]

Keys hold their position (it is rotated into them), so their order is free. With a sliding window of
``sink + window`` every query sees exactly its window and the sinks: they stand between the old end
of the window and the query, so they never leave, and push its start out by their number. Only the
two ends of a table may hold part of a page (the causal mask cuts one, the sliding window the
other), so a sink must be whole pages; :mod:`rlkv_vllm.kernels.cpu.streaming` supports any.

A decode step reads the cache in place. A prefill reads a scratch cache of the same layout: tokens
that leave the window before their chunk ends have no block (lean prefill).

Shape suffixes: N tokens, M requests, P tiles, W pages of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkv_vllm.kernels.cpu.step import StreamingStep

#: Tokens of a page, the smallest that vLLM's kernel takes; a block holds one or more.
PAGE = 16

#: Most query tokens of a tile. From 16 to 256 the length made no difference (CPU, 2026-11-24).
MAX_TILE = 64

_Ints = NDArray[np.int64]


def serves(sink: int, window: int) -> bool:
    """Whether tables of pages can express the mask."""
    return sink % PAGE == 0 and window >= PAGE


@dataclass(frozen=True)
class Tiles:
    """Tiles as vLLM's operator takes requests."""

    rows: Tensor | None  # rows of the step that the tiles answer, in order; None: all rows
    tables: Tensor  # int32 [P, W], page ids
    lengths: Tensor  # int32 [P], keys in each table
    starts: Tensor  # int32 [P + 1], first row of each tile among `rows`


@dataclass(frozen=True)
class Scratch:
    """The scratch cache of a prefill."""

    num_pages: int
    cached: Tensor  # page ids in the cache that are copied
    copies: Tensor  # their pages in the scratch cache
    ends: Tensor  # pages with the last token of a request: what follows is read and masked
    slots: Tensor  # int64, scratch slots of the new tokens of `Tiles.rows`


@dataclass(frozen=True)
class RingStep:
    """One step of all streaming heads that read one block table."""

    slots: Tensor  # int64 [N], cache slots of the new tokens; -1 where there is no block
    decode: Tiles | None  # requests with one new token, over the cache
    prefill: tuple[Tiles, Scratch] | None  # the others


def plan_ring_step(step: StreamingStep) -> RingStep:
    """Tables of one step, shared by all layers; `serves` must hold for its sink and window."""
    # numpy: at these sizes a torch operation costs several times as much.
    table = step.block_table.numpy()
    ends = step.seq_lens.numpy().astype(np.int64)
    rows = step.query_start_loc.numpy().astype(np.int64)
    news, rows = np.diff(rows), rows[:-1]
    geometry = _Geometry(step.sink // PAGE, step.window, step.block_size // PAGE)
    slots = step.slot_mapping
    single, many = news == 1, news > 1
    if single.all():
        return RingStep(slots, _decode(table, ends, None, geometry), None)
    slots = torch.where(slots >= step.block_size, slots, -1)
    decode = None
    if single.any():
        decode = _decode(table[single], ends[single], rows[single], geometry)
    prefill = _prefill(table[many], ends[many], news[many], rows[many], geometry)
    return RingStep(slots, decode, prefill)


@dataclass(frozen=True)
class _Geometry:
    sink_pages: int
    window: int
    pages_per_block: int

    def first_page(self, positions: _Ints) -> _Ints:
        """First page after the sinks that a query at a position sees."""
        return np.maximum((positions - self.window + 1) // PAGE, self.sink_pages)

    def page_ids(self, tables: NDArray[np.int32], requests: _Ints, pages: _Ints) -> _Ints:
        blocks = tables[requests, pages // self.pages_per_block].astype(np.int64)
        return blocks * self.pages_per_block + pages % self.pages_per_block


def _tables(first: _Ints, last: _Ints, geometry: _Geometry) -> tuple[_Ints, _Ints]:
    """Logical pages of tiles, and how many keys precede each tile's own pages.

    ``first`` and ``last`` are the positions of each tile's first and last query.
    """
    sinks = geometry.sink_pages
    own, end = first // PAGE, last // PAGE
    window_from = geometry.first_page(first)
    # A tile that begins among the sinks sees all before it: its table is the request's own.
    num_window = np.where(own < sinks, 0, own - window_from)
    num_sinks = np.minimum(own, sinks)
    before = num_window + num_sinks
    width = int((before + end - own).max()) + 1
    j = np.arange(width)
    pages = np.where(
        j < num_window[:, None],
        window_from[:, None] + j,
        np.where(
            j < before[:, None],
            j - num_window[:, None],
            np.minimum(own[:, None] + j - before[:, None], end[:, None]),
        ),
    )
    return pages, before * PAGE


def _decode(
    tables: NDArray[np.int32], ends: _Ints, rows: _Ints | None, geometry: _Geometry
) -> Tiles:
    positions = ends - 1
    pages, before = _tables(positions, positions, geometry)
    requests = np.arange(len(ends))
    return Tiles(
        rows=None if rows is None else torch.from_numpy(rows),
        tables=_int32(geometry.page_ids(tables, requests[:, None], pages)),
        lengths=_int32(before + positions % PAGE + 1),
        starts=torch.arange(len(ends) + 1, dtype=torch.int32),
    )


def _prefill(
    tables: NDArray[np.int32], ends: _Ints, news: _Ints, rows: _Ints, geometry: _Geometry
) -> tuple[Tiles, Scratch]:
    sinks = geometry.sink_pages
    first, last = ends - news, ends - 1
    requests = np.arange(len(ends))

    # Scratch pages of a request: its sinks, then the window before the chunk and the chunk.
    from_page = geometry.first_page(first)
    end_page = last // PAGE + 1
    num_sinks = np.minimum(end_page, sinks)
    num_pages = num_sinks + np.maximum(end_page - from_page, 0)
    base = np.cumsum(num_pages) - num_pages
    total = int(num_pages.sum())

    def scratch_pages(requests: _Ints, pages: _Ints) -> _Ints:
        after_sinks = num_sinks[requests] + pages - from_page[requests]
        return base[requests] + np.where(pages < sinks, pages, after_sinks)

    owner = np.repeat(requests, num_pages)
    page = np.arange(total) - base[owner]
    page = np.where(page < num_sinks[owner], page, page - num_sinks[owner] + from_page[owner])
    copies = np.flatnonzero(page * PAGE < first[owner])
    cached = geometry.page_ids(tables, owner[copies], page[copies])

    owner_N = np.repeat(requests, news)
    offset_N = np.arange(len(owner_N)) - (np.cumsum(news) - news)[owner_N]
    position_N = first[owner_N] + offset_N
    slots_N = scratch_pages(owner_N, position_N // PAGE) * PAGE + position_N % PAGE

    # Tiles begin at page boundaries, but for the first of a request.
    tile = max(PAGE, min(MAX_TILE, geometry.window // PAGE * PAGE))
    aligned = first // PAGE * PAGE
    num_tiles = (last - aligned) // tile + 1
    owner_P = np.repeat(requests, num_tiles)
    tile_P = np.arange(len(owner_P)) - (np.cumsum(num_tiles) - num_tiles)[owner_P]
    begin_P = aligned[owner_P] + tile_P * tile
    first_P = np.maximum(begin_P, first[owner_P])
    last_P = np.minimum(begin_P + tile - 1, last[owner_P])
    pages_PW, before_P = _tables(first_P, last_P, geometry)
    starts = np.zeros(len(owner_P) + 1, np.int32)
    np.cumsum(last_P - first_P + 1, out=starts[1:])
    return (
        Tiles(
            rows=torch.from_numpy(rows[owner_N] + offset_N),
            tables=_int32(scratch_pages(owner_P[:, None], pages_PW)),
            lengths=_int32(before_P + last_P - first_P // PAGE * PAGE + 1),
            starts=torch.from_numpy(starts),
        ),
        Scratch(
            num_pages=total,
            cached=torch.from_numpy(cached),
            copies=torch.from_numpy(copies),
            ends=torch.from_numpy(scratch_pages(requests, last // PAGE)),
            slots=torch.from_numpy(slots_N),
        ),
    )


def _int32(values: _Ints) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
