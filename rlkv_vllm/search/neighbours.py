"""Allocations around given ones: one streaming and one full head change places.

There are many, so not all are evaluated. Of an exchange it is known what the cross-entropy is
before the new head streams (one evaluation per streaming head), and what the new head cost in the
last exchange with it; 0 before the first one, as the cross-entropy seldom falls while more heads
stream. The exchange with the lowest sum is evaluated next, until that is one whose cross-entropies
are known (lazy evaluation, Minoux 1978, https://doi.org/10.1007/BFb0006528).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

from rlkv_vllm.allocation.streaming import Head, Streaming

#: Allocations of ascending sparsities, each with the streaming heads of those before it.
Nested = tuple[Streaming, ...]

#: Exchanged allocations evaluated at most: one per head that may move, and so many per neighbour.
TRIED = 4


def best_neighbours(
    loss: Callable[[Streaming], float], nested: Nested, heads: Sequence[Head], wanted: int
) -> list[Nested]:
    """The neighbours of `nested` with the lowest sum of cross-entropies, lowest first.

    In each a head has changed places with another one of `heads`, in all allocations in which one
    streams and the other is full; so they stay nested. At most `wanted` are returned.
    """
    pairs = [
        (old, new)
        for old, new in permutations(heads, 2)
        if any(_differ(one, old, new) for one in nested)
    ]
    now = [loss(one) for one in nested]
    without = {
        (place, old): loss(_without(one, old))
        for place, one in enumerate(nested)
        for old in dict.fromkeys(old for old, _ in pairs)
        if old in one
    }
    rise: dict[tuple[int, Head], float] = {}
    known: dict[tuple[int, Head, Head], float] = {}

    def total(pair: tuple[Head, Head]) -> float:
        """Sum of the cross-entropies after an exchange, or what it is estimated to be."""
        result = cost = 0.0
        for place, one in enumerate(nested):
            # What a head costs while fewer heads stream, it costs while more do.
            cost = rise.get((place, pair[1]), cost)
            if not _differ(one, *pair):
                result += now[place]
            else:
                result += known.get((place, *pair), without[place, pair[0]] + cost)
        return result

    def unknown(pair: tuple[Head, Head]) -> list[int]:
        """Places of the allocations that an exchange alters and that are not evaluated."""
        places = [i for i, one in enumerate(nested) if _differ(one, *pair)]
        return [place for place in places if (place, *pair) not in known]

    found: list[tuple[Head, Head]] = []
    left = len(heads) + TRIED * wanted
    while len(found) < wanted:
        open_ones = [pair for pair in pairs if pair not in found and (left or not unknown(pair))]
        if not open_ones:
            break
        old, new = least = min(open_ones, key=lambda pair: (total(pair), pair))
        if not (places := unknown(least)):
            found.append(least)
            continue
        left -= 1
        place = places[0]
        known[place, old, new] = loss(exchanged(nested, old, new)[place])
        rise[place, new] = known[place, old, new] - without[place, old]
    return [exchanged(nested, *pair) for pair in found]


def most_evaluations(heads: int, counts: int, candidates: int) -> int:
    """How many allocations `best_neighbours` evaluates at most.

    `heads` and `counts` are the numbers of heads that may move and of sparsities.
    """
    return counts * (1 + heads) + heads + TRIED * candidates


def exchanged(nested: Nested, old: Head, new: Head) -> Nested:
    """`new` streams instead of `old` wherever `old` streams and `new` is full."""
    return tuple(
        tuple(sorted((*_without(one, old), new))) if _differ(one, old, new) else one
        for one in nested
    )


def _differ(streaming: Streaming, old: Head, new: Head) -> bool:
    return old in streaming and new not in streaming


def _without(streaming: Streaming, head: Head) -> Streaming:
    return tuple(one for one in streaming if one != head)
