"""What the results of a few hundred problems allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def wilson_interval(solved: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927, the score interval), within [0, 1].

    Args:
        solved: problems solved, 0 to `n`.
        n: problems, at least 1.
    """
    share = solved / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of two results on the same problems.

    Problems that both or neither solved say nothing; of the others each side wins half under
    the null hypothesis (McNemar 1947, with the binomial distribution instead of chi-squared).

    Args:
        first: per problem, whether it is solved.
        second: the same problems in the same order.

    Returns:
        The p-value; 1 if the results do not differ.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return min(1.0, 2 * _fair_coin_tail(max(only_first, only_second), only_first + only_second))


def sign_test_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact one-sided sign test: is `first` higher more often than lower, on the same problems?

    Args:
        first: a value per problem.
        second: the same problems in the same order.

    Returns:
        The p-value; 1 if the values do not differ.
    """
    pairs = list(zip(first, second, strict=True))
    higher, lower = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return _fair_coin_tail(higher, higher + lower)


def _fair_coin_tail(heads: int, throws: int) -> float:
    """Probability of at least so many heads."""
    return sum(math.comb(throws, k) for k in range(heads, throws + 1)) / 2**throws


def percentile_95(values: Sequence[int]) -> int:
    """The smallest of `values`, at least one, that 95% of them do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
