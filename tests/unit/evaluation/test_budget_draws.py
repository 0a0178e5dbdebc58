"""A sparsity beyond the budget is proven in at most 5% of 1,000 evaluations that stop early.

`python -m tests.support.budget_draws` prints the table of all scenarios.
"""

from __future__ import annotations

import numpy as np
import pytest

from rlkv_vllm.evaluation import looks
from rlkv_vllm.profile.budget import LEVEL, Verdict, largest_within
from tests.support.budget_draws import BEYOND, BUDGET, Scenario, draw, evaluate, run

DRAWS = 1000
LOSS = Scenario("loss", 400, 0.04, BUDGET + BEYOND)
SAMPLED = Scenario("sampled", 240, 0.1, BUDGET + BEYOND, samples=4, agreement=0.9)
CUT = Scenario("cut", 400, cut_changed=0.04, more_cut=BUDGET + BEYOND)
LONG = Scenario("long", 400, length_ratio=1.1 + BEYOND, spread=1.5, cap=4096)
RARE = Scenario("rare", 400, length_ratio=1.1 + BEYOND, spread=0.8, cap=4096, explodes=True)


@pytest.mark.parametrize(
    "scenario",
    [LOSS, Scenario("many", 400, 0.1, BUDGET + BEYOND), SAMPLED, CUT, LONG, RARE],
    ids=lambda scenario: scenario.name,
)
def test_a_sparsity_just_beyond_is_hardly_ever_proven(scenario: Scenario) -> None:
    found = run(scenario, DRAWS)
    assert found.proven <= 0.05
    assert found.violated <= 0.06  # its true value is the limit


def test_without_smaller_levels_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "nominal_levels", lambda shares: (LEVEL,) * len(shares))
    assert run(LOSS, DRAWS).proven > 0.05


def test_larger_sparsities_do_not_help() -> None:
    """Three sparsities: one holds, two do not; with 5% of luck the first of these is taken."""
    rng = np.random.default_rng(1)
    chosen = []
    for _ in range(100):
        full, beyond = draw(LOSS, rng)
        rows = evaluate(LOSS.problems, [full, full, beyond, beyond], (0.2, 0.4, 0.6))
        chosen.append(largest_within([row.assessment for row in rows], Verdict.PROVEN))
    assert chosen.count(0.2) >= 95
    assert None not in chosen


def test_a_sparsity_that_loses_nothing_is_proven_early() -> None:
    good = Scenario("good", looks.planned_problems(BUDGET), 0.1, cut_changed=0.01, spread=0.8)
    found = run(good, 100)
    assert found.proven > 0.7
    assert found.violated == 0
    assert found.problems < 0.9 * good.problems
