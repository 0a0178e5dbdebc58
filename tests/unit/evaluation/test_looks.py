"""When an evaluation looks at its answers: levels against published tables, problems needed."""

from __future__ import annotations

from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom

from rlkv_vllm.evaluation.looks import (
    SHARES,
    Look,
    least_problems,
    limits_of,
    nominal_levels,
    planned_problems,
    problems_needed,
    schedule,
)
from rlkv_vllm.profile.budget import CORRECTION, LEVEL
from rlkv_vllm.statistics import tango_bounds

NORMAL = NormalDist()


def limits(shares: tuple[float, ...], level: float) -> list[float]:
    return [NORMAL.inv_cdf(1 - one) for one in nominal_levels(shares, level)]


@pytest.mark.parametrize(
    ("looks", "level", "published"),
    [
        # Reboussin, DeMets, Kim and Lan 2000, "Computations for group sequential boundaries using
        # the Lan-DeMets spending function method": the O'Brien-Fleming type.
        (2, 0.025, [2.963, 1.969]),
        (4, 0.025, [4.333, 2.963, 2.359, 2.014]),
        (5, 0.025, [None, 3.357, 2.680, 2.290, 2.031]),
        (2, 0.05, [2.538, 1.662]),
        (4, 0.05, [3.750, 2.540, 2.016, 1.720]),
    ],
)
def test_levels_are_the_published_ones(
    looks: int, level: float, published: list[float | None]
) -> None:
    found = limits(tuple((look + 1) / looks for look in range(looks)), level)
    for ours, theirs in zip(found, published, strict=True):
        assert theirs is None or ours == pytest.approx(theirs, abs=0.0015)


@pytest.mark.parametrize(
    ("constant", "power"),
    # Jennison and Turnbull 2000, "Group sequential methods", tables 2.1 and 2.3, four looks, 10%
    # two-sided: Pocock's limits are constant, O'Brien and Fleming's fall with the root.
    [(2.067, 0.0), (1.733, 0.5)],
)
def test_the_recursion_gives_published_limits_their_level(constant: float, power: float) -> None:
    shares = [0.25, 0.5, 0.75, 1.0]
    wanted = [constant / share**power for share in shares]
    errors: list[float] = []
    for limit in wanted:  # the error of each look that has this limit

        def away(error: float, limit: float = limit) -> float:
            return limits_of(shares[: len(errors) + 1], [*errors, error])[-1] - limit

        errors.append(brentq(away, 1e-6, 0.2, xtol=1e-6))
    assert sum(errors) == pytest.approx(0.05, abs=3e-4)


def test_one_look_has_the_whole_level() -> None:
    assert nominal_levels((1.0,)) == (LEVEL,)
    assert schedule(200).looks == (Look(200, LEVEL),)
    assert not schedule(200).stops


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5000))
def test_looks_end_with_the_last_problem(problems: int) -> None:
    plan = schedule(problems, 0.02)
    ends = [look.problems for look in plan.looks]
    assert ends == sorted(set(ends))
    assert ends[-1] == plan.problems == problems
    assert all(end >= min(100, problems) for end in ends)
    assert all(0 < look.level <= LEVEL for look in plan.looks)
    levels = [look.level for look in plan.looks]
    assert levels == sorted(levels)


@pytest.mark.parametrize(
    ("max_loss", "changed"), [(0.01, 0.02), (0.02, 0.02), (0.02, 0.1), (0.05, 0.1)]
)
def test_so_many_problems_prove_with_the_power(max_loss: float, changed: float) -> None:
    """Exact: lost and gained answers are binomial, alike often."""
    n = problems_needed(max_loss, changed)

    def is_within(lost: int, gained: int) -> bool:
        return tango_bounds(lost, gained, n, LEVEL, CORRECTION)[1] <= max_loss

    most = int(n * changed + 8 * (n * changed) ** 0.5)
    proven, lost = 0.0, 0
    for differing in range(most):  # the most that may be lost of them grows with them
        while lost <= differing and is_within(lost, differing - lost):
            lost += 1
        while lost and not is_within(lost - 1, differing - lost + 1):
            lost -= 1
        proven += binom.pmf(differing, n, changed) * binom.cdf(lost - 1, differing, 0.5)
    assert 0.77 < proven < 0.86


def test_planned_problems() -> None:
    assert planned_problems(0.02) == 1800
    assert planned_problems(0.01) > 2 * planned_problems(0.02)
    # A large budget does not make the share that is cut off easier to prove.
    assert planned_problems(0.2) >= problems_needed(0.02, 0.02, level=nominal_levels(SHARES)[-1])


def test_fewest_problems_that_prove() -> None:
    least = least_problems(0.02)
    assert tango_bounds(0, 0, least, LEVEL, CORRECTION)[1] <= 0.02
    assert tango_bounds(0, 0, least - 1, LEVEL, CORRECTION)[1] > 0.02
    assert least_problems(0.2) == least  # of the share that is cut off
    assert least_problems(0.01) > least
