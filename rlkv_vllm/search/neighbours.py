"""Allocations around given ones: at a sparsity one streaming and one full head change places.

The allocations of the other sparsities stay as they are, or change by one exchange so that they
stay nested: above it the new head replaces the head whose streaming costs most, below it the
streaming head that costs least replaces the old one.

There are many neighbours, so not all are evaluated. Of an exchange it is known what the
cross-entropy is before the new head streams (one evaluation per streaming head), and what the new
head cost in the last exchange with it; 0 before the first one, as the cross-entropy seldom falls
while more heads stream. The neighbour with the lowest sum is evaluated next, until that is one
whose cross-entropies are known (lazy evaluation, Minoux 1978, https://doi.org/10.1007/BFb0006528).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlkv_vllm.allocation.streaming import Head, Streaming

#: Allocations of ascending sparsities, each with the streaming heads of those before it.
Nested = tuple[Streaming, ...]

#: Exchanged allocations evaluated at most: one per head that may move, and so many per neighbour.
TRIED = 4


@dataclass(frozen=True)
class _Exchange:
    """`new` streams instead of `old` in the allocation number `place`."""

    place: int
    old: Head
    new: Head

    def of(self, nested: Nested) -> Streaming:
        return tuple(sorted({*nested[self.place]} - {self.old} | {self.new}))


#: At most one exchange per allocation, by its number.
_Neighbour = tuple[_Exchange, ...]


def best_neighbours(
    loss: Callable[[Streaming], float], nested: Nested, heads: Sequence[Head], wanted: int
) -> list[Nested]:
    """The neighbours of `nested` with the lowest sum of cross-entropies, lowest first.

    Only `heads` change places. At most `wanted` neighbours are returned.
    """
    now = [loss(one) for one in nested]
    without = {
        (place, old): loss(tuple(head for head in one if head != old))
        for place, one in enumerate(nested)
        for old in heads
        if old in one
    }
    neighbours = dict.fromkeys(
        _nested_exchange(nested, _Exchange(place, old, new), without)
        for place, old in without
        for new in heads
        if new not in nested[place]
    )
    known: dict[_Exchange, float] = {}
    rise: dict[tuple[int, Head], float] = {}

    def total(neighbour: _Neighbour) -> float:
        """Sum of the cross-entropies, or what it is estimated to be."""
        result, cost = sum(now), 0.0
        for one in neighbour:
            # What a head costs while fewer heads stream, it costs while more do.
            cost = rise.get((one.place, one.new), cost)
            estimate = without[one.place, one.old] + cost
            result += known.get(one, estimate) - now[one.place]
        return result

    found: list[_Neighbour] = []
    left = len(heads) + TRIED * wanted
    while len(found) < wanted:
        choice = [it for it in neighbours if left or all(one in known for one in it)]
        if not choice:
            break
        least = min(choice, key=total)  # of equal ones the first
        unknown = [one for one in least if one not in known]
        if not unknown:
            found.append(least)
            del neighbours[least]
            continue
        left -= 1
        one = unknown[0]
        known[one] = loss(one.of(nested))
        rise[one.place, one.new] = known[one] - without[one.place, one.old]
    return [_applied(nested, neighbour) for neighbour in found]


def _nested_exchange(
    nested: Nested, first: _Exchange, without: Mapping[tuple[int, Head], float]
) -> _Neighbour:
    """The exchange `first`, and those that keep the allocations nested.

    `without` has the cross-entropies without a streaming head, for all heads that may move.
    """
    exchanges, inner = {first.place: first}, {*first.of(nested)}
    for place in range(first.place + 1, len(nested)):
        if first.new in nested[place]:
            break
        outer = [head for head in nested[place] if head not in inner and (place, head) in without]
        old = min(outer, key=lambda head: without[place, head])
        exchanges[place] = _Exchange(place, old, first.new)
        inner = {*exchanges[place].of(nested)}
    outside = nested[first.place]
    for place in range(first.place - 1, -1, -1):
        if first.old not in nested[place]:
            break
        more = [
            head for head in outside if head not in nested[place] and (first.place, head) in without
        ]
        new = max(more, key=lambda head: without[first.place, head], default=first.new)
        exchanges[place] = _Exchange(place, first.old, new)
        outside = exchanges[place].of(nested)
    return tuple(exchanges[place] for place in sorted(exchanges))


def _applied(nested: Nested, neighbour: _Neighbour) -> Nested:
    changed = {one.place: one.of(nested) for one in neighbour}
    return tuple(changed.get(place, one) for place, one in enumerate(nested))


def most_evaluations(heads: int, counts: int, candidates: int) -> int:
    """How many allocations `best_neighbours` evaluates at most.

    `heads` and `counts` are the numbers of heads that may move and of sparsities.
    """
    return counts * (1 + heads) + heads + TRIED * candidates
