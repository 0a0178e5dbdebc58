"""Intervals and paired tests for the results of a few hundred problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def wilson_interval(solved: int, n: int) -> tuple[float, float]:
    """95% interval of a share of at least one problem (Wilson 1927, the score interval)."""
    from scipy.stats import binomtest

    interval = binomtest(solved, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of two results on the same problems.

    Problems that both or neither solved say nothing; of the others each side wins half under
    the null hypothesis (McNemar 1947, with the binomial distribution instead of chi-squared).
    The p-value is 1 if the results do not differ.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return _fair_coin_p(only_first, only_second, "two-sided")


def sign_test_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact one-sided sign test: is `first` higher more often than lower, on the same problems?

    The p-value is 1 if the values do not differ.
    """
    pairs = list(zip(first, second, strict=True))
    higher, lower = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return _fair_coin_p(higher, lower, "greater")


def _fair_coin_p(heads: int, tails: int, alternative: Literal["two-sided", "greater"]) -> float:
    from scipy.stats import binomtest

    n = heads + tails
    return float(binomtest(heads, n, alternative=alternative).pvalue) if n else 1.0


def percentile_95(values: Sequence[int]) -> int:
    """The smallest of `values`, at least one, that 95% of them do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
