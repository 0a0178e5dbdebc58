"""Neighbours of allocations by cross-entropy, against all of them evaluated."""

import math
import random
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.search.neighbours import Nested, best_neighbours, exchanged, most_evaluations
from rlkv_vllm.search.search import nested_of
from tests.unit.search.planted import HEADS, planted, random_share

ALL = len(HEADS) ** 2


class Loss:
    """Counts what is evaluated."""

    def __init__(self, share=planted) -> None:  # type: ignore[no-untyped-def]
        self.asked: set[Streaming] = set()
        self._share = share

    def __call__(self, streaming: Streaming) -> float:
        self.asked.add(streaming)
        return -math.log(self._share({*streaming}))


def every_neighbour(nested: Nested, heads: list[Head]) -> set[Nested]:
    return {exchanged(nested, *pair) for pair in permutations(heads, 2)} - {nested}


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
    assert {*found} <= every_neighbour(nested, heads)
    assert len(found) == len({*found}) == min(wanted, len(every_neighbour(nested, heads)))
    for other in found:
        assert [len(one) for one in other] == counts
        assert all({*less} < {*more} for less, more in pairwise(other))
        (moved,) = {tuple(sorted({*a} ^ {*b})) for a, b in zip(nested, other, strict=True)} - {()}
        assert len(moved) == 2
        assert {*moved} <= {*heads}
    assert len(loss.asked) <= most_evaluations(moving, len(counts), wanted)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("counts", [[8], [8, 10], [5, 10, 15]])
def test_costs_that_add_up_give_the_very_best(seed: int, counts: list[int]) -> None:
    rng = random.Random(seed)
    cost = {head: rng.random() for head in HEADS}
    nested = nested_of(rng.sample(HEADS, len(HEADS)), counts)

    def loss(streaming: Streaming) -> float:
        return sum(cost[head] for head in streaming)

    def total(other: Nested) -> float:
        return sum(map(loss, other))

    found = best_neighbours(loss, nested, HEADS, 12)
    best = sorted(map(total, every_neighbour(nested, HEADS)))[:12]
    assert [*map(total, found)] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_is_found_with_few_evaluations(seed: int) -> None:
    """Costs of heads and of pairs: lazily the best neighbour is found, or one nearly as good."""
    share = random_share(seed)
    nested = nested_of(random.Random(seed).sample(HEADS, len(HEADS)), [8, 10])
    loss, exact = Loss(share), Loss(share)

    def total(other: Nested) -> float:
        return sum(map(exact, other))

    first = best_neighbours(loss, nested, HEADS, 12)[0]
    totals = sorted(map(total, every_neighbour(nested, HEADS)))
    assert total(first) <= totals[1] + 1e-9
    assert len(loss.asked) < len(exact.asked) / 1.5


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
