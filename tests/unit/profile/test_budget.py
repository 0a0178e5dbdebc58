"""Verdicts of evaluation rows at their edges, and the sparsity that they allow together."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.budget import (
    MAX_LENGTH_RATIO,
    Budget,
    ContradictingRowsError,
    Verdict,
    asked_budget,
    assess,
    assess_rows,
    cache_dtype,
    largest_within,
    parse_loss,
    percent,
)
from rlkv_vllm.profile.schema import EvaluationRow, PairedCounts
from tests.support.profiles import assert_one_line, measured_row

PROVEN, MEASURED = Verdict.PROVEN, Verdict.MEASURED
UNDECIDED, VIOLATED = Verdict.UNDECIDED, Verdict.VIOLATED


def old_row(sparsity: float, accuracy: float, n: int = 300, **changes: Any) -> EvaluationRow:
    """As older versions wrote it: without counts of pairs."""
    fields: dict[str, Any] = {
        "task": "sums",
        "n": n,
        "sparsity": sparsity,
        "accuracy": accuracy,
        "full_accuracy": 0.8,
        "mean_output_tokens": 100.0,
        "capped_share": 0.0,
    }
    return EvaluationRow(**(fields | changes))


def with_paired(row: EvaluationRow, **changes: Any) -> EvaluationRow:
    assert row.paired is not None
    return row.model_copy(update={"paired": row.paired.model_copy(update=changes)})


# --- one row ---------------------------------------------------------------------------


def test_a_bound_exactly_at_the_budget_proves_it() -> None:
    row = measured_row(0.4, lost=8, gained=6)
    bound = assess(row).loss.high
    assert assess(row, bound).verdict is PROVEN
    assert assess(row, bound - 1e-6).verdict is MEASURED


def test_a_lower_bound_exactly_at_the_budget_is_not_beyond_it() -> None:
    row = measured_row(0.4, lost=80, gained=6)
    bound = assess(row).loss.low
    assert assess(row, bound).verdict is UNDECIDED
    assert assess(row, bound - 1e-6).verdict is VIOLATED


@pytest.mark.parametrize(("n", "verdict"), [(199, UNDECIDED), (200, MEASURED)])
def test_an_estimate_needs_enough_problems(n: int, verdict: Verdict) -> None:
    assert assess(measured_row(0.4, lost=3, gained=3, n=n), 0.01).verdict is verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, PROVEN),
        ({"mean_output_tokens": 109.0}, MEASURED),  # its bound is above 1.1
        ({"mean_output_tokens": 111.0}, UNDECIDED),
        ({"mean_output_tokens": 115.0}, VIOLATED),
        ({"capped_share": 0.01}, PROVEN),  # the counts of pairs decide
        ({"capped_share": 0.021}, UNDECIDED),
        ({"capped_share": None}, UNDECIDED),
        ({"full_mean_output_tokens": None}, UNDECIDED),
        ({"allocation": None}, MEASURED),  # nobody knows which heads
        ({"accuracy": 0.3}, UNDECIDED),  # contradicts its own counts
    ],
)
def test_the_worst_measure_decides(changes: dict[str, Any], verdict: Verdict) -> None:
    row = measured_row(0.4, lost=2, gained=2).model_copy(update=changes)
    assert assess(row).verdict is verdict


def test_answers_that_are_cut_off_decide() -> None:
    row = measured_row(0.4, lost=2, gained=2)
    assert assess(with_paired(row, newly_cut=5)).verdict is PROVEN
    assert assess(with_paired(row, newly_cut=50)).verdict is VIOLATED
    unknown = with_paired(row, tokens_error=None)
    assert assess(unknown).verdict is MEASURED
    assert "length ratio 1 of 1.1 allowed" in assess(unknown).describe()


def test_samples_of_one_problem_say_less_than_as_many_problems() -> None:
    row = measured_row(0.4, lost=8, gained=8, n=250, samples=4)
    apart = assess(with_paired(row, design_effect=1.0)).loss
    together = assess(with_paired(row, design_effect=4.0)).loss
    assert assess(row).loss == together, "unknown: as one answer per problem"
    assert together.low < apart.low <= apart.estimate <= apart.high < together.high
    plain = assess(measured_row(0.4, lost=2, gained=2, n=250)).loss
    assert together.high == pytest.approx(plain.high)


def test_a_row_that_could_stop_early_has_wider_bounds() -> None:
    row = measured_row(0.4, lost=4, gained=2)
    assert assess(with_paired(row, level=0.01)).loss.high > assess(row).loss.high


def test_a_row_of_an_older_file_takes_the_figures_of_its_full_row() -> None:
    full = old_row(0, 0.8)
    assert assess(old_row(0.4, 0.79), full=full).verdict is MEASURED
    assert assess(old_row(0.4, 0.79)).verdict is UNDECIDED
    assert assess(old_row(0.4, 0.79, n=199), full=full).verdict is UNDECIDED
    assert assess(old_row(0.4, 0.77), full=full).verdict is UNDECIDED  # no bound: never violated
    long = old_row(0.4, 0.8, mean_output_tokens=100 * MAX_LENGTH_RATIO + 1)
    assert assess(long, full=full).verdict is UNDECIDED
    assert math.isinf(assess(old_row(0.4, 0.79), full=full).loss.high)


def test_the_full_cache_loses_nothing() -> None:
    assert assess(old_row(0, 0.8, n=1)).verdict is PROVEN


def test_an_assessment_in_words() -> None:
    text = assess(measured_row(0.4, 30, 22, task="a\nb"), 0.01).describe()
    assert text.startswith("measured: loses 0.8 points, at most ")
    assert text.endswith(", n 1000, task a b")
    for temperature, words in ((0.0, "greedy"), (0.6, "temperature 0.6")):
        text = assess(measured_row(0.4, 0, temperature=temperature)).describe()
        assert text.endswith(f", task sums, {words}")


COUNTS = st.integers(0, 60)


@given(lost=COUNTS, gained=COUNTS, n=st.integers(200, 2000), budgets=st.tuples(*[st.floats()] * 2))
def test_a_larger_budget_never_gets_a_lower_verdict(
    lost: int, gained: int, n: int, budgets: tuple[float, float]
) -> None:
    row = measured_row(0.4, lost, gained, n)
    low, high = sorted(0.0005 + abs(math.sin(each)) / 5 if math.isfinite(each) else 0.05
                       for each in budgets)  # fmt: skip
    assert assess(row, low).verdict <= assess(row, high).verdict


@given(lost=COUNTS, gained=COUNTS, n=st.integers(200, 2000), budget=st.floats(0.001, 0.3))
def test_what_is_proven_is_within_by_its_estimate(
    lost: int, gained: int, n: int, budget: float
) -> None:
    assessed = assess(measured_row(0.4, lost, gained, n), budget)
    if assessed.verdict >= MEASURED:
        assert all(one.estimate <= one.limit + 1e-9 for one in assessed.measures)
    if assessed.verdict is VIOLATED:
        assert assessed.loss.estimate > budget
    assert assessed.loss.low <= assessed.loss.estimate <= assessed.loss.high


@given(
    lost=COUNTS,
    more=st.integers(1, 30),
    gained=COUNTS,
    n=st.integers(200, 2000),
    budget=st.floats(0.001, 0.3),
)
def test_more_lost_answers_never_improve_a_verdict(
    lost: int, more: int, gained: int, n: int, budget: float
) -> None:
    before = assess(measured_row(0.4, lost, gained, n), budget)
    after = assess(measured_row(0.4, lost + more, gained, n), budget)
    assert after.verdict <= before.verdict
    assert after.loss.high >= before.loss.high


# --- several rows ----------------------------------------------------------------------

GOOD = {"lost": 0, "gained": 0}
FAIR = {"lost": 30, "gained": 22}
BAD = {"lost": 100}


@pytest.mark.parametrize(
    ("rows", "proven", "measured"),
    [
        ([], None, None),
        ([measured_row(0, **GOOD)], None, None),  # never the full cache
        ([measured_row(0.2, **GOOD), measured_row(0.4, **GOOD)], 0.4, 0.4),
        ([measured_row(0.4, **GOOD), measured_row(0.2, **FAIR)], None, 0.4),
        ([measured_row(0.2, **GOOD), measured_row(0.4, **FAIR)], 0.2, 0.4),
        ([measured_row(0.8, **GOOD), measured_row(0.4, **BAD)], None, None),
        # Every task must hold, and must have been measured.
        ([measured_row(0.4, **GOOD), measured_row(0.4, **BAD, task="hard")], None, None),
        (
            [measured_row(s, **GOOD, task=t) for s, t in ((0.2, "a"), (0.2, "b"), (0.4, "a"))],
            0.2,
            0.2,
        ),
        # So must every sampling.
        ([measured_row(0.4, **GOOD), measured_row(0.4, **BAD, temperature=0.6)], None, None),
    ],
)  # fmt: skip
def test_the_largest_sparsity_within_the_budget(
    rows: list[EvaluationRow], proven: float | None, measured: float | None
) -> None:
    assessments = assess_rows(rows, 0.0125)
    assert largest_within(assessments, PROVEN) == proven
    assert largest_within(assessments, MEASURED) == measured


def test_of_several_rows_the_one_with_most_answers_counts_then_the_worst() -> None:
    few, many = measured_row(0.4, n=200, **GOOD), measured_row(0.4, n=2000, **FAIR)
    (one,) = assess_rows([many, few])
    assert one.row == many
    sampled = measured_row(0.4, n=600, samples=4, **GOOD)
    assert [each.row for each in assess_rows([sampled, many])] == [sampled]
    good, fair = measured_row(0.4, **GOOD, seed=1), measured_row(0.4, **FAIR, seed=2)
    for rows in ([good, fair], [fair, good]):  # another seed does not buy a better verdict
        assert [each.row for each in assess_rows(rows)] == [fair]


def test_contradicting_rows_are_named() -> None:
    rows = [measured_row(0.4, **GOOD, seed=3), measured_row(0.4, **BAD, seed=4)]
    with pytest.raises(ContradictingRowsError) as caught:
        assess_rows(rows)
    assert_one_line(caught.value, "task sums", "sparsity 0.4", "seed 3 proves", "seed 4 violates")
    assert assess_rows(rows, 0.5)  # both within


def test_a_full_row_is_that_of_the_same_task_and_sampling() -> None:
    rows = [old_row(0, 0.8), old_row(0.4, 0.8), old_row(0.4, 0.8, task="other")]
    assert [one.verdict for one in assess_rows(rows)] == [PROVEN, MEASURED, UNDECIDED]


def test_names_of_the_cache_type() -> None:
    own = (None, "auto", "bfloat16", "float16")
    assert {cache_dtype(name) for name in own} == {None}
    assert cache_dtype("fp8") == cache_dtype("fp8_e4m3") != cache_dtype("fp8_e5m2")


# --- what the user asks for ------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"),
    [("1%", 0.01), ("0.01", 0.01), (" 2.5% ", 0.025), (0.01, 0.01), ("1e-3", 0.001), ("99%", 0.99)],
)
def test_a_budget_is_read(given: str | float, value: float) -> None:
    assert parse_loss("--max-loss", given) == pytest.approx(value)


@pytest.mark.parametrize(
    "given",
    ["0", "0%", "-1%", "-0.1", "100%", "1", "2", "nan", "inf", "nan%", "", "%", "one", "1%%"]
    + ["1 %x", "1\n2", 0, 1, -1.0, math.nan, math.inf, True],
)
def test_a_budget_that_is_none(given: str | float) -> None:
    with pytest.raises(RlkvError) as caught:
        parse_loss("--max-loss", given)
    assert_one_line(caught.value, "--max-loss", "1% or 0.01")


def test_a_budget_without_its_percent_sign() -> None:
    with pytest.raises(RlkvError, match=r"did you mean 1%\?"):
        parse_loss("--max-loss", "1")
    with pytest.raises(RlkvError, match=r"did you mean 2\.5%\?"):
        parse_loss("--max-loss", 2.5)


@given(st.floats(1e-6, 0.999))
def test_a_budget_is_read_as_it_is_shown(value: float) -> None:
    assert parse_loss("--max-loss", percent(value)) == pytest.approx(value, rel=1e-9)


def test_what_goes_together() -> None:
    assert asked_budget(None, None, 0.4) is None
    assert asked_budget("1%", None, None) == Budget(0.01, PROVEN)
    assert asked_budget(0.01, "measured", None) == Budget(0.01, MEASURED)
    for asked, words in (
        ((None, "measured", None), ("--evidence measured", "--max-loss 1%")),
        (("1%", None, 0.4), ("--max-loss 1%", "--sparsity 0.4", "remove one")),
        (("1%", None, 0.0), ("--max-loss 1%", "--sparsity 0")),
        (("1%", "guessed", None), ("--evidence guessed", "proven or measured")),
        (("x", "guessed", None), ("--max-loss x",)),
    ):
        with pytest.raises(RlkvError) as caught:
            asked_budget(*asked)  # type: ignore[arg-type]
        assert_one_line(caught.value, *words)


@pytest.mark.parametrize("evidence", ["proven", "measured"])
def test_options_and_flags_say_the_same(evidence: str) -> None:
    budget = asked_budget("2%", evidence, None)
    assert budget is not None
    options = budget.options()
    assert asked_budget(options["max_loss"], options.get("evidence"), None) == budget  # type: ignore[arg-type]
    more = [] if evidence == "proven" else ["--evidence", "measured"]
    assert budget.flags() == ["--max-loss", "2%", *more]


def test_counts_of_pairs_are_part_of_the_row() -> None:
    row = measured_row(0.4, lost=1)
    assert isinstance(row.paired, PairedCounts)
    assert EvaluationRow.model_validate_json(row.model_dump_json()) == row
