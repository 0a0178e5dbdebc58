"""Intervals and paired tests for the results of a few hundred problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal


def wilson_interval(solved: float, n: float) -> tuple[float, float]:
    """95% interval of a share of at least one problem (Wilson 1927, the score interval)."""
    z = NormalDist().inv_cdf(0.975)
    share, spread = solved / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test_p(
    first: Sequence[float],
    second: Sequence[float],
    alternative: Literal["two-sided", "greater"] = "greater",
) -> float:
    """Exact sign test: is `first` higher more often than lower, on the same problems?

    Two-sided, with one result per problem, it is McNemar's exact test (McNemar 1947). Problems
    whose values are equal say nothing; the p-value is 1 if none differ.
    """
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    higher, lower = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    if not higher + lower:
        return 1.0
    return float(binomtest(higher, higher + lower, alternative=alternative).pvalue)


def sign_flip_p(differences: Sequence[int]) -> float:
    """Exact two-sided permutation test of paired differences, one per problem.

    Under the null hypothesis each difference is as likely with the other sign (Fisher 1935). The
    p-value is the share of all sign patterns whose sum is as far from 0 as the given one. Where
    all differences are 0, 1 or -1 it is that of the sign test.
    """
    import numpy as np
    from scipy.stats import binom

    sums: Any = np.ones(1)  # probabilities of the sums from -reach to reach
    for size, count in Counter(abs(value) for value in differences if value).items():
        flipped = np.zeros(2 * size * count + 1)
        flipped[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        sums = np.convolve(sums, flipped)
    reach, observed = len(sums) // 2, abs(sum(differences))
    if observed == 0:
        return 1.0
    return min(1.0, float(2 * sums[reach + observed :].sum()))


def tango_bounds(
    gained: float, lost: float, n: float, level: float = 0.05, correction: float = 0.0
) -> tuple[float, float]:
    """Bounds of the difference of two shares on the same `n` pairs, each one-sided at `level`.

    The score interval of Tango 1998, "Equivalence test and confidence interval for the difference
    in proportions for the paired-sample design" (Statistics in Medicine 17, equations 5 to 8). Of
    the pairs, `gained` have only the first and `lost` only the second; the estimate is
    ``(gained - lost) / n``. Counts may be fractions: those divided by a `design_effect`. A
    continuity `correction` of half a pair keeps the level where few pairs differ.
    """
    z = NormalDist().inv_cdf(1 - level)
    estimate = (gained - lost) / n

    def score(difference: float, shift: float) -> float:
        variance = n * tango_variance(gained / n, lost / n, difference)
        away = gained - lost - n * difference + shift
        return math.copysign(math.inf, away) if variance <= 0 else away / math.sqrt(variance)

    def bound(side: int) -> float:
        inside, outside = estimate, float(side)
        for _ in range(40):
            middle = (inside + outside) / 2
            if -side * score(middle, side * correction) < z:
                inside = middle
            else:
                outside = middle
        return inside

    return bound(-1), bound(1)


def tango_variance(gained: float, lost: float, difference: float) -> float:
    """Variance of one pair's difference if the true `difference` is as given.

    `gained` and `lost` are shares of the pairs (Tango 1998, equations 6 and 7).
    """
    # The share of `lost` that is most likely then.
    b = -gained - lost + (2 - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
    return 2 * share + difference * (1 - difference)


def design_effect(differences: Sequence[int], samples: int) -> float:
    """How much less `samples` pairs of one problem say than as many pairs of others.

    `differences` are 1, 0 or -1 for every pair, those of a problem in a row. The ratio of the
    variance between problems to that of independent pairs (Kish 1965), from 1 to `samples`; counts
    and number of pairs are divided by it (Rao and Scott 1992). One problem whose pairs all differ
    alike is added: where few pairs differ, the effect is taken to be large.
    """
    starts = range(0, len(differences), samples)
    sums = [sum(differences[start : start + samples]) for start in starts]
    total, discordant = sum(sums), sum(map(abs, differences))
    between = sum(value * value for value in sums) - total * total / len(sums)
    independent = discordant - total * total / len(differences)
    effect = (between + samples * samples) / (independent + samples)
    return min(float(samples), max(1.0, effect))


def log_ratio_error(
    first: Sequence[float],
    second: Sequence[float],
    longest: float | None = None,
    level: float = 0.05,
) -> float:
    """Standard error of ``log(mean(first) / mean(second))``, values paired by problem.

    The delta method for a ratio of means; infinite for a single problem. It says nothing of large
    values that are so rare that none or few are seen. With `longest`, the largest value that
    `first` could have, the error is that of an upper bound at `level` that holds for them, too: a
    value of this size more counts as often as in the score bound of a rate of rare events, half of
    z squared in the mean and once in the variance.
    """
    n = len(first)
    if n < 2:
        return math.inf
    total, base = sum(first), sum(second)
    ratio = total / base
    squares = sum((a - ratio * b) ** 2 for a, b in zip(first, second, strict=True))
    variance = squares * n / (n - 1) / base**2  # of the ratio
    if longest is None:
        return math.sqrt(variance) / ratio
    z = NormalDist().inv_cdf(1 - level)
    more = max(0.0, longest - total / n) / base
    return math.log1p((more * z * z / 2 + z * math.sqrt(variance + more * more)) / ratio) / z


def percentile_95(values: Sequence[int]) -> int:
    """The smallest of `values`, at least one, that 95% of them do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
