"""When an evaluation may stop: looks at the answers so far, and how many problems a budget needs.

Bounds that are looked at repeatedly fail more often than their level says. So each look has a
smaller one (`nominal_levels`): its bounds are repeated confidence intervals (Jennison and Turnbull
1989, "Interim analyses: the repeated confidence interval approach", JRSS B 51), which hold at all
looks together, for every budget and whatever made the evaluation stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from rlkv_vllm.profile.budget import CORRECTION, LEVEL, MAX_LENGTH_RATIO, MAX_LOSS, MAX_MORE_CUT
from rlkv_vllm.statistics import tango_bounds, tango_variance

#: When answers are looked at, as shares of the planned problems.
SHARES = (0.25, 0.5, 0.75, 1.0)
#: Fewer problems than this are never looked at before the last look.
LEAST_LOOK = 100
#: Shares of answers that change against the full cache: few at low sparsity, many when sampled.
FEW_CHANGE, MANY_CHANGE = 0.02, 0.1
#: Chance that a sparsity which loses nothing is proven.
POWER = 0.8


@dataclass(frozen=True)
class Look:
    """After `problems`, bounds are computed at the one-sided error `level`."""

    problems: int
    level: float = LEVEL


@dataclass(frozen=True)
class Schedule:
    """When the answers of a split are looked at, and the loss that decides; the last look ends it.

    Without `stops` a decision does not end the split.
    """

    looks: tuple[Look, ...]
    max_loss: float = MAX_LOSS
    stops: bool = False

    @property
    def problems(self) -> int:
        return self.looks[-1].problems

    @property
    def first_proof(self) -> int:
        """The problems from which the last look could prove anything."""
        return least_problems(self.max_loss, self.looks[-1].level)

    def level(self, problems: int) -> float:
        """That of the look after so many problems."""
        return next(look.level for look in self.looks if look.problems == problems)


def schedule(problems: int, max_loss: float | None = None) -> Schedule:
    """Looks at `problems`: one at the end, or, with a budget to be decided, up to four."""
    if max_loss is None:
        return Schedule((Look(problems),))
    ends = {round(share * problems) for share in SHARES}
    ends = {end for end in ends if end >= LEAST_LOOK} | {problems}
    places = sorted(ends)
    levels = nominal_levels(tuple(end / problems for end in places))
    looks = tuple(Look(end, level) for end, level in zip(places, levels, strict=True))
    return Schedule(looks, max_loss, stops=True)


@cache
def nominal_levels(shares: tuple[float, ...], level: float = LEVEL) -> tuple[float, ...]:
    """One-sided error levels of looks at `shares` of the answers, ascending; together `level`.

    What the looks may err until each of them grows as ``2 - 2 * cdf(z / sqrt(share))`` with z that
    of half of `level`: hardly anything early, as with the limits of O'Brien and Fleming (Lan and
    DeMets 1983, "Discrete sequential boundaries for clinical trials", Biometrika 70). Rounded to
    seven digits, so that files of all machines agree.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - level / 2)
    spent = [2 - 2 * normal.cdf(z / math.sqrt(share)) for share in shares]
    new = [now - before for before, now in zip([0.0, *spent], spent, strict=False)]
    return tuple(round(1 - normal.cdf(limit), 7) for limit in limits_of(shares, new))


def limits_of(shares: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Limits of a standardised normal sum that is looked at when `shares` of it are there.

    It passes limit k, and none before, with probability ``errors[k]``. By recursive integration
    over the sum (Armitage, McPherson and Rowe 1969, "Repeated significance tests on accumulating
    data", JRSS A 132).
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import ndtr

    limits: list[float] = []
    sums, weights = np.zeros(1), np.ones(1)  # the sums that passed no limit, and their probability
    before = 0.0
    for share, error in zip(shares, errors, strict=True):
        spread = math.sqrt(share - before)

        def passes(limit: float, sums=sums, weights=weights, spread=spread) -> float:  # type: ignore[no-untyped-def]
            return float(weights @ ndtr((sums - limit) / spread))

        limit = float(brentq(lambda x, wanted=error: passes(x) - wanted, -9, 9, xtol=1e-12))
        limits.append(limit / math.sqrt(share))
        low = -9 * math.sqrt(share)
        nodes, steps = np.polynomial.legendre.leggauss(400)
        grid = low + (nodes + 1) * (limit - low) / 2
        distance = (grid[:, None] - sums) / spread
        density = np.exp(-distance * distance / 2) / (spread * math.sqrt(2 * math.pi))
        sums, weights = grid, (density @ weights) * steps * (limit - low) / 2
        before = share
    return limits


def problems_needed(
    max_loss: float, changed: float, *, power: float = POWER, level: float = LEVEL
) -> int:
    """Problems after which a sparsity that loses nothing is proven with probability `power`.

    Args:
        max_loss: the budget, a share.
        changed: share of the answers that are correct here or with the full cache, not both.
        power: of the test.
        level: of the bound (Tango 1998, with the continuity correction).
    """
    normal = NormalDist()
    under_loss = tango_variance(changed / 2, changed / 2, -max_loss)
    away = normal.inv_cdf(1 - level) * math.sqrt(under_loss)
    away += normal.inv_cdf(power) * math.sqrt(changed)
    root = (away + math.sqrt(away * away + 4 * max_loss * CORRECTION)) / (2 * max_loss)
    return math.ceil(root * root)


def problems_for_length(mean: float, longest: int, level: float = LEVEL) -> int:
    """Problems from which the length of answers can be proven, if they get no longer at all.

    The more tokens an answer may have (`longest`) relative to the `mean`, the more could be hidden
    in a few long answers that none of the problems shows (`log_ratio_error`).
    """
    z = NormalDist().inv_cdf(1 - level)
    return math.ceil((longest / mean - 1) * (z * z / 2 + z) / (MAX_LENGTH_RATIO - 1))


def planned_problems(max_loss: float) -> int:
    """Problems to plan for a budget: enough if many answers change, in hundreds.

    The share of answers cut off must be proven, too.
    """
    level = nominal_levels(SHARES)[-1]
    accuracy = problems_needed(max_loss, MANY_CHANGE, level=level)
    cut = problems_needed(MAX_MORE_CUT, FEW_CHANGE, level=level)
    return math.ceil(max(accuracy, cut) / 100) * 100


def least_problems(max_loss: float, level: float = LEVEL) -> int:
    """Problems from which a bound can be within the budget at all: if no answer changes."""
    allowed = min(max_loss, MAX_MORE_CUT)
    low, high = 0, 1  # not enough, enough
    while tango_bounds(0, 0, high, level, CORRECTION)[1] > allowed:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = tango_bounds(0, 0, middle, level, CORRECTION)[1] <= allowed
        low, high = (low, middle) if is_enough else (middle, high)
    return high
