"""Intervals and paired tests against known values."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkv_vllm.statistics import (
    design_effect,
    log_ratio_error,
    percentile_95,
    sign_flip_p,
    sign_test_p,
    tango_bounds,
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
    assert sign_test_p(first, second, "two-sided") == pytest.approx(p)
    assert sign_test_p(second, first, "two-sided") == pytest.approx(p)


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


def test_the_sign_test_wants_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        sign_test_p([True], [True, False])


def test_the_sign_test_of_thousands() -> None:
    assert sign_test_p(*pairs(3000, 0), "two-sided") == pytest.approx(0, abs=1e-300)
    assert 0.9 < sign_test_p(*pairs(1500, 1501), "two-sided") <= 1


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_sign_flips_against_all_patterns(differences: list[int]) -> None:
    sums = [
        sum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    far = sum(abs(total) >= abs(sum(differences)) for total in sums)
    assert sign_flip_p(differences) == pytest.approx(far / len(sums))


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=300))
def test_sign_flips_of_single_answers_are_the_sign_test(differences: list[int]) -> None:
    p = sign_test_p(differences, [0] * len(differences), "two-sided")
    assert sign_flip_p(differences) == pytest.approx(p)


def test_sign_flips_of_thousands() -> None:
    assert sign_flip_p([3, -3] * 2000) == 1
    assert 0 < sign_flip_p([3, 1, 2] * 100 + [0] * 2000) < 1e-60


@pytest.mark.parametrize(
    ("values", "expected"), [([7], 7), (range(1, 21), 19), (range(1, 101), 95), ([3, 1, 2], 3)]
)
def test_percentile(values: list[int], expected: int) -> None:
    assert percentile_95(list(values)) == expected


def brute_force_score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's statistic with the constrained likelihood maximised on a grid."""
    same = n - gained - lost
    least, most = max(0.0, -difference), (1 - difference) / 2
    shares = np.linspace(least, most, 200_001)[1:-1]  # of pairs that only the second has
    with np.errstate(divide="ignore"):
        likelihood = (
            gained * np.log(shares + difference)
            + lost * np.log(shares)
            + same * np.log(1 - 2 * shares - difference)
        )
    share = shares[np.nanargmax(likelihood)]
    variance = n * (2 * share + difference * (1 - difference))
    return float((gained - lost - n * difference) / np.sqrt(variance))


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(12, 2, 50), (3, 9, 300), (1, 1, 40), (0, 5, 100), (40, 60, 1000)]
)
def test_tango_bounds_against_brute_force(gained: int, lost: int, n: int) -> None:
    low, high = tango_bounds(gained, lost, n, 0.05)
    assert low < (gained - lost) / n < high
    assert brute_force_score(gained, lost, n, low) == pytest.approx(1.6449, abs=2e-3)
    assert brute_force_score(gained, lost, n, high) == pytest.approx(-1.6449, abs=2e-3)


def test_tango_bounds_without_a_difference() -> None:
    z2 = 1.6448536**2
    assert tango_bounds(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))
    low, high = tango_bounds(0, 30, 30)
    assert low == pytest.approx(-1, abs=1e-9)
    assert high == pytest.approx((z2 - 30) / (30 + z2))  # all pairs are of one kind: Wilson's


@given(
    st.integers(1, 400).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.just(n)).flatmap(
            lambda pair: st.tuples(
                st.just(pair[0]), st.integers(0, pair[1] - pair[0]), st.just(pair[1])
            )
        )
    ),
    st.sampled_from([0.05, 0.025, 0.001]),
)
def test_tango_bounds_mirror_and_contain(counts: tuple[int, int, int], level: float) -> None:
    gained, lost, n = counts
    low, high = tango_bounds(gained, lost, n, level)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert tango_bounds(lost, gained, n, level) == pytest.approx((-high, -low), abs=1e-9)
    wider = tango_bounds(gained, lost, n, level / 2)
    assert wider[0] <= low + 1e-12
    assert wider[1] >= high - 1e-12


def test_design_effect() -> None:
    assert design_effect([0] * 400, 4) == 4  # nothing is known: as if every problem were one pair
    assert design_effect([1, 1, 1, 1] * 50 + [0] * 400, 4) == 4
    assert design_effect([1, 0, 0, 0] * 50 + [0] * 400, 4) == 1
    half = design_effect([1, 1, 0, 0] * 50 + [0] * 400, 4)
    assert half == pytest.approx((200 - 1e4 / 150 + 16) / (100 - 1e4 / 600 + 4))
    assert design_effect([1, -1, 0, 1], 1) == 1


def test_log_ratio_error_against_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    second = rng.gamma(4, 25, 500)
    first = second * 0.5 + rng.gamma(4, 15, 500)
    rows = rng.integers(0, 500, (2000, 500))
    bootstrap = np.log(first[rows].mean(1) / second[rows].mean(1)).std()
    assert log_ratio_error(list(first), list(second)) == pytest.approx(bootstrap, rel=0.06)
    assert log_ratio_error(list(second), list(second)) == 0
    assert log_ratio_error([3], [2]) == float("inf")
