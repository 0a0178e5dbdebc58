"""Intervals and paired tests against known values."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkv_vllm.statistics import (
    mcnemar_p,
    percentile_95,
    sign_test_p,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("solved", "n", "low", "high"),
    # R: binom::binom.wilson; the first is textbook (Newcombe 1998, table I: 81 of 263).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (29, 29, 0.8830, 1)],
)
def test_wilson(solved: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(solved, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share(pair: tuple[int, int]) -> None:
    solved, n = pair
    low, high = wilson_interval(solved, n)
    assert 0 <= low <= solved / n + 1e-12
    assert solved / n - 1e-12 <= high <= 1


def pairs(only_first: int, only_second: int, same: int = 7) -> tuple[list[bool], list[bool]]:
    both = (
        [(True, False)] * only_first
        + [(False, True)] * only_second
        + [(True, True), (False, False)] * same
    )
    random.Random(0).shuffle(both)
    return [a for a, _ in both], [b for _, b in both]


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    # Twice the smaller binomial tail: sums of Pascal's triangle over 2^n.
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 2 / 32),
        (10, 1, 2 * 12 / 2048),
        (3, 3, 1),
        (2, 8, 2 * 56 / 1024),
    ],
)
def test_mcnemar(only_first: int, only_second: int, p: float) -> None:
    first, second = pairs(only_first, only_second)
    assert mcnemar_p(first, second) == pytest.approx(p)
    assert mcnemar_p(second, first) == pytest.approx(p)


@pytest.mark.parametrize(
    ("higher", "lower", "p"),
    # The binomial tail: sums of Pascal's triangle over 2^n.
    [(0, 0, 1), (5, 0, 1 / 32), (0, 5, 1), (10, 1, 12 / 2048), (2, 2, 11 / 16)],
)
def test_sign_test(higher: int, lower: int, p: float) -> None:
    first, second = pairs(higher, lower)
    assert sign_test_p(first, second) == pytest.approx(p)


def test_the_sign_test_counts_problems_and_not_gains() -> None:
    assert sign_test_p([1, 0, 0, 0.5], [0, 0.5, 0.5, 0.5]) == 7 / 8


def test_mcnemar_wants_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar_p([True], [True, False])


def test_mcnemar_of_thousands() -> None:
    assert mcnemar_p(*pairs(3000, 0)) == pytest.approx(0, abs=1e-300)
    assert 0.9 < mcnemar_p(*pairs(1500, 1501)) <= 1


@pytest.mark.parametrize(
    ("values", "expected"), [([7], 7), (range(1, 21), 19), (range(1, 101), 95), ([3, 1, 2], 3)]
)
def test_percentile(values: list[int], expected: int) -> None:
    assert percentile_95(list(values)) == expected
