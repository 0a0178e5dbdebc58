"""Neighbours of allocations by cross-entropy, against all of them evaluated."""

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.search.neighbours import Nested, best_neighbours, most_evaluations
from rlkv_vllm.search.search import nested_of
from tests.unit.search.planted import HEADS, planted, random_share


class Loss:
    """Counts what is evaluated."""

    def __init__(self, share: Callable[[set[Head]], float] = planted) -> None:
        self.asked: set[Streaming] = set()
        self._share = share

    def __call__(self, streaming: Streaming) -> float:
        self.asked.add(streaming)
        return -math.log(self._share({*streaming}))


def exchanges(one: Streaming) -> Iterator[tuple[Head, Head, Streaming]]:
    for old in one:
        for new in HEADS:
            if new not in one:
                yield old, new, swapped(one, old, new)


def swapped(one: Streaming, old: Head, new: Head) -> Streaming:
    return tuple(sorted({*one} - {old} | {new}))


def every_neighbour(less: Streaming, more: Streaming) -> set[Nested]:
    """All with one exchange in `less` or `more`, and at most one in the other to stay nested."""
    found: set[Nested] = set()
    for _, new, inner in exchanges(less):
        if new in more:
            found.add((inner, more))
        else:
            found |= {(inner, swapped(more, old, new)) for old in more if old not in inner}
    for old, _, outer in exchanges(more):
        if old in less:
            found |= {(swapped(less, old, new), outer) for new in outer if new not in less}
        else:
            found.add((less, outer))
    return found


@settings(max_examples=60, deadline=None)
@given(
    ranking=st.permutations(HEADS),
    counts=st.sets(st.integers(1, 19), min_size=1, max_size=3).map(sorted),
    moving=st.integers(2, 20),
    wanted=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_neighbours_are_nested_different_and_within_budget(
    ranking: list[Head], counts: list[int], moving: int, wanted: int, seed: int
) -> None:
    nested, heads, loss = nested_of(ranking, counts), ranking[:moving], Loss(random_share(seed))
    found = best_neighbours(loss, nested, heads, wanted)
    assert nested not in found
    assert len(found) == len({*found}) <= wanted
    some_move = any(0 < len({*heads} & {*one}) < moving for one in nested)
    assert bool(found) == some_move
    for other in found:
        assert [len(one) for one in other] == counts
        assert all({*less} < {*more} for less, more in pairwise(other))
        for old, new in zip(nested, other, strict=True):
            assert len({*old} ^ {*new}) in (0, 2)
            assert {*old} ^ {*new} <= {*heads}
    assert len(loss.asked) <= most_evaluations(moving, len(counts), wanted)


@pytest.mark.parametrize("seed", range(8))
def test_costs_that_add_up_give_the_very_best(seed: int) -> None:
    rng = random.Random(seed)
    cost = {head: rng.random() for head in HEADS}
    ranking = rng.sample(HEADS, len(HEADS))

    def loss(streaming: Streaming) -> float:
        return sum(cost[head] for head in streaming)

    def total(other: Nested) -> float:
        return sum(map(loss, other))

    (one,) = nested = nested_of(ranking, [8])
    found = best_neighbours(loss, nested, HEADS, 12)
    best = sorted(loss(other) for _, _, other in exchanges(one))[:12]
    assert [*map(total, found)] == pytest.approx(best)
    less, more = nested_of(ranking, [8, 11])
    (first,) = best_neighbours(loss, (less, more), HEADS, 1)
    assert total(first) == pytest.approx(min(map(total, every_neighbour(less, more))))


@pytest.mark.parametrize("seed", range(8))
def test_a_good_one_is_found_with_few_evaluations(seed: int) -> None:
    """Costs of heads and of pairs: among the best of all, lazily."""
    share = random_share(seed)
    less, more = nested_of(random.Random(seed).sample(HEADS, len(HEADS)), [8, 10])
    loss, exact = Loss(share), Loss(share)

    def total(other: Nested) -> float:
        return sum(map(exact, other))

    first = best_neighbours(loss, (less, more), HEADS, 12)[0]
    totals = sorted(map(total, every_neighbour(less, more)))
    assert total(first) <= totals[len(totals) // 50] + 1e-9
    assert len(loss.asked) < len(exact.asked) / 1.5


def test_other_sparsities_lose_what_costs_most_and_get_what_costs_least() -> None:
    """A head that must not stream has come in between: who is replaced is not who was there."""
    cost = dict.fromkeys(HEADS, 1.0) | {HEADS[0]: 0.6, HEADS[3]: 2.0, HEADS[9]: 0.0, HEADS[4]: 0.5}
    loss = lambda streaming: sum(cost[head] for head in streaming)  # noqa: E731
    nested = nested_of(HEADS, [3, 6])
    # The first: 9 replaces one that costs 1; the second keeps that one and loses 3.
    (best,) = best_neighbours(loss, nested, HEADS, 1)
    assert {*best[0]} == {HEADS[0], HEADS[9], HEADS[1]} or {*best[0]} == {*HEADS[:3:2], HEADS[9]}
    assert {*best[1]} == {*HEADS[:6]} - {HEADS[3]} | {HEADS[9]}
    # 4 moves down where 3 would be taken out above.
    cost[HEADS[0]] = 9.0
    (best,) = best_neighbours(loss, nested, HEADS, 1)
    assert [HEADS[0] in one for one in best] == [False, False]


def test_of_two_heads_that_do_the_same_work_the_right_one_streams() -> None:
    """Each alone looks as dispensable as the other; one of them has work of its own, too."""
    first, second = (0, 0), (4, 3)

    def share(streaming: set[Head]) -> float:
        lost = 0.5 * ({first, second} <= streaming) + 0.1 * (first in streaming)
        return math.exp(-lost - 0.2 * len(streaming - {first, second, *HEADS[4:11]}))

    nested = nested_of([first, *HEADS[4:11]], [8])
    (best,) = best_neighbours(Loss(share), nested, HEADS, 1)[0]
    assert second in best
    assert first not in best
    assert {*best} ^ {*nested[0]} == {first, second}
