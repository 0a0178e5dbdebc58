"""Packing the heads of an allocation into vLLM's KV cache groups.

Every KV head is one cache layer: one page per block. vLLM gives all cache layers of a group
one block table, and a block of the shared pool costs as many pages as the largest group on
the rank has cache layers; smaller groups are padded. There is one group for the full heads and
`num_ring_groups` for the streaming heads: with more of them a block is smaller, but a request
holds more blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from rlkv_vllm.allocation.heads import Allocation

FULL_GROUP = 0

# A group costs the scheduler time at every step, so fewer groups may cost this much memory.
NEAR_TIE = 1.005


@dataclass(frozen=True)
class CacheGroups:
    """The group of every KV head.

    On each rank a layer reads at most two groups: the full group and one ring group, or, if
    it has no full heads there, up to two ring groups.

    Attributes:
        group_of: [layers][KV heads]: `FULL_GROUP`, or a ring group 1..num_ring_groups.
    """

    allocation: Allocation
    group_of: tuple[tuple[int, ...], ...]
    num_ring_groups: int

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that exist: the full group unless no head is full, and the ring groups."""
        first = FULL_GROUP if self.allocation.num_full else FULL_GROUP + 1
        return tuple(range(first, self.num_ring_groups + 1))

    def size(self, rank: int, group: int) -> int:
        """Cache layers (KV heads) of `group` on `rank`, without padding."""
        return self._sizes[rank][group]

    def pages_per_block(self, rank: int) -> int:
        """Pages that a block costs on `rank`: cache layers of its largest group."""
        return max(self._sizes[rank].values())

    def padding(self, rank: int, group: int) -> int:
        """Dummy cache layers that make `group` as large as the largest group of `rank`.

        Not 0 for the full group only where a rank has fewer full heads than the ring heads of
        one of its layers need, or one full head less than another rank has.
        """
        return self.pages_per_block(rank) - self.size(rank, group) if group in self.groups else 0

    @cached_property
    def _sizes(self) -> tuple[Counter[int], ...]:
        local = map(self.allocation.heads_of, range(self.allocation.tp_size))
        return tuple(Counter(row[head] for row in self.group_of for head in ids) for ids in local)


@lru_cache(maxsize=64)
def pack(allocation: Allocation, *, full_blocks: int, ring_blocks: int) -> CacheGroups:
    """Choose the number of ring groups and the group of every streaming head.

    Minimises what a request of the target length costs on the rank where it costs most:
    `pages_per_block * (full_blocks + num_ring_groups * ring_blocks)` pages. Within 0.5% of
    that minimum the fewest groups win. The full group, which holds nearly all blocks, is
    padded only if it is smaller than what the ring heads of a single layer need: then, at
    sparsities close to 1, the waste is large (`Forecast.waste`). Deterministic.
    """
    if full_blocks < 1 or ring_blocks < 1:
        raise ValueError(f"{full_blocks=} and {ring_blocks=} must be at least 1")
    # Ranks that hold copies of the same heads are packed once.
    step = max(1, allocation.tp_size // allocation.num_kv_heads)
    ranks = [_Rank(allocation, rank) for rank in range(0, allocation.tp_size, step)]
    if not allocation.num_full:
        full_blocks = 0
    packings = list(_packings(ranks, full_blocks, ring_blocks)) if allocation.num_streaming else []
    num_ring_groups = 0
    group_of = [[FULL_GROUP] * allocation.num_kv_heads for _ in allocation.full]
    if packings:
        cheapest = min(cost for cost, _ in packings)
        bins_of_ranks = next(bins for cost, bins in packings if cost <= NEAR_TIE * cheapest)
        num_ring_groups = len(bins_of_ranks[0])
        for rank, bins in zip(ranks, bins_of_ranks, strict=True):
            unplaced = [list(heads) for heads in rank.streaming]
            for group, pieces in enumerate(bins, start=FULL_GROUP + 1):
                for layer, size in pieces.items():
                    for head in unplaced[layer][:size]:
                        group_of[layer][head] = group
                    del unplaced[layer][:size]
            assert not any(unplaced)
    return CacheGroups(allocation, tuple(map(tuple, group_of)), num_ring_groups)


# A ring group of one rank while it is filled: layer -> number of its heads in the group.
_Bin = dict[int, int]


class _Rank:
    """What one rank has to pack."""

    def __init__(self, allocation: Allocation, rank: int) -> None:
        layers = range(allocation.num_layers)
        self.streaming = [allocation.streaming_on(rank, layer) for layer in layers]
        self.num_full = allocation.num_full_on(rank)
        self.num_streaming = allocation.num_streaming_on(rank)
        self.heads_per_layer = allocation.heads_per_rank
        self.mixed = [  # (ring heads, layer), the largest first
            (len(self.streaming[layer]), layer)
            for layer in layers
            if 0 < len(self.streaming[layer]) < self.heads_per_layer
        ]
        self.mixed.sort(key=lambda item: (-item[0], item[1]))
        self.all_streaming = [
            layer for layer in layers if len(self.streaming[layer]) == self.heads_per_layer
        ]
        # What the ring heads of one layer need in a group: all of them if the layer reads the
        # full group too, half of them if not.
        self.layer_need = max(
            self.mixed[0][0] if self.mixed else 0,
            math.ceil(self.heads_per_layer / 2) if self.all_streaming else 0,
        )

    def least_pages(self, num_bins: int) -> int:
        """Lower bound of the pages per block with `num_bins` ring groups."""
        return max(self.num_full, self.layer_need, math.ceil(self.num_streaming / num_bins))

    def pack(self, num_bins: int, most_pages: float) -> tuple[int, list[_Bin]] | None:
        """Pages per block, at most `most_pages`, and the filled ring groups; None: not found."""
        pages = self.least_pages(num_bins)
        while pages <= most_pages:
            if (bins := self._fill(num_bins, pages)) is not None:
                return pages, bins
            pages += 1
        return None

    def _fill(self, num_bins: int, capacity: int) -> list[_Bin] | None:
        """Best-fit decreasing; layers without full heads then fill the holes in two pieces."""
        bins: list[_Bin] = [{} for _ in range(num_bins)]
        room = [capacity] * num_bins

        def place(layer: int, piece: int, index: int) -> None:
            bins[index][layer] = piece
            room[index] -= piece

        for piece, layer in self.mixed:
            fitting = [index for index in range(num_bins) if room[index] >= piece]
            if not fitting:
                return None
            place(layer, piece, min(fitting, key=lambda index: room[index]))
        for layer in self.all_streaming:
            pieces = _one_or_two_pieces(room, self.heads_per_layer)
            if pieces is None:
                return None
            for index, piece in pieces:
                place(layer, piece, index)
        return bins


def _one_or_two_pieces(room: list[int], size: int) -> list[tuple[int, int]] | None:
    """Where `size` heads fit in one or two pieces, as (index, piece); None: nowhere.

    The smallest hole is filled first, together with one that the rest fills exactly, else with
    the largest, so that the other holes keep their sizes.
    """
    by_room: dict[int, list[int]] = {}
    for index, free in enumerate(room):
        if free:
            by_room.setdefault(free, []).append(index)
    for free in sorted(by_room):
        hole, rest = by_room[free][0], size - free
        if rest <= 0:
            return [(hole, size)]
        for other in (*by_room.get(rest, ())[:2], by_room[max(by_room)][-1]):
            if other != hole and room[other] >= rest:
                return [(hole, free), (other, rest)]
    return None


def _packings(
    ranks: list[_Rank], full_blocks: int, ring_blocks: int
) -> Iterator[tuple[int, list[list[_Bin]]]]:
    """Cost and content of every packing that may be among the best, fewest groups first."""
    most = max(rank.num_streaming for rank in ranks)
    fewest_pages = max(rank.least_pages(most) for rank in ranks)
    # Ring groups larger than the full group would pad it, more of them cost less. On a rank
    # with one full head less than another padding is free: the other decides.
    most_pages: float = math.inf
    if all(rank.num_full >= rank.layer_need for rank in ranks):
        most_pages = max(rank.num_full for rank in ranks)
    cheapest: float = math.inf
    for num_bins in range(1, most + 1):
        blocks = full_blocks + num_bins * ring_blocks
        if fewest_pages * blocks > cheapest:
            return
        if max(rank.least_pages(num_bins) for rank in ranks) * blocks > NEAR_TIE * cheapest:
            continue
        packings = (rank.pack(num_bins, most_pages) for rank in ranks)
        packed = [packing for packing in packings if packing is not None]
        if len(packed) == len(ranks):
            cost = max(pages for pages, _ in packed) * blocks
            cheapest = min(cheapest, cost)
            yield cost, [bins for _, bins in packed]
