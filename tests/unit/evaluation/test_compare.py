"""Comparison of scorers: pooled tests and the table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scipy.stats import binomtest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.compare import (
    Outcome,
    compare,
    markdown,
    pooled_mcnemar_p,
    rank_agreement,
    sign_flip_p,
)
from rlkv_vllm.evaluation.measurement import Measurement
from rlkv_vllm.evaluation.splits import FULL, STREAMING
from tests.support.profiles import assert_one_line


def outcome(
    label: str, solved: Sequence[int], run: int = 0, base: str = "b", sparsity: float = 0.5
) -> Outcome:
    correct = tuple(bool(value) for value in solved)
    lengths = tuple(10 + i for i in range(len(correct)))
    return Outcome(base, label, run, sparsity, Measurement(correct, lengths, 1, 1.0))


def bits(solved: int, n: int) -> list[int]:
    return [1] * solved + [0] * (n - solved)


def test_pooled_mcnemar_counts_pairs_of_all_bases_and_runs() -> None:
    first = [outcome("a", [1, 1, 1, 0], 0), outcome("a", [1, 1, 0, 0], 1)]
    second = [outcome("b", [0, 0, 1, 1], 0), outcome("b", [1, 0, 0, 0], 1)]
    # Pairs that differ: 2 for a and 1 for b, then 1 for a.
    assert pooled_mcnemar_p(first, second) == pytest.approx(binomtest(3, 4).pvalue)
    other = [outcome("a", [1, 1, 1, 1], base="c")], [outcome("b", [0, 0, 0, 0], base="c")]
    pooled = pooled_mcnemar_p(first + other[0], second + other[1])
    assert pooled == pytest.approx(binomtest(7, 8).pvalue)


def test_one_run_is_paired_with_every_run() -> None:
    runs = [outcome("a", bits(6, 8), i) for i in range(3)]
    assert pooled_mcnemar_p(runs, [outcome("b", bits(4, 8))]) == binomtest(6, 6).pvalue
    with pytest.raises(RlkvError) as error:
        pooled_mcnemar_p(runs, [outcome("b", bits(4, 8), i) for i in range(2)])
    assert_one_line(error.value, "a has 3 profiles and b 2", "or one")


def test_sign_flips_count_a_problem_once_however_many_runs() -> None:
    # Five problems differ, always in the same direction: 2 of 32 sign patterns are as extreme.
    one = [outcome("a", bits(8, 10))], [outcome("b", bits(3, 10))]
    assert sign_flip_p(*one) == pytest.approx(2 / 32)
    thrice = [[outcome(side[0].label, side[0].measurement.correct, i) for i in range(3)]
              for side in one]  # fmt: skip
    assert sign_flip_p(*thrice) == pytest.approx(2 / 32)
    assert pooled_mcnemar_p(*thrice) < 0.001
    assert sign_flip_p(one[0], one[0]) == 1
    large = [outcome("a", bits(60, 100))], [outcome("b", bits(20, 100))]
    assert sign_flip_p(*large) == sign_flip_p(*large) < 0.001


def test_rank_agreement() -> None:
    up, down = [[0.1, 0.2], [0.3, 0.9]], [[0.9, 0.3], [0.2, 0.1]]
    assert rank_agreement([up, up]) == pytest.approx(1)
    assert rank_agreement([up, down]) == pytest.approx(-1)
    assert rank_agreement([up, up, down]) == pytest.approx(-1 / 3)
    assert rank_agreement([up]) is None
    assert rank_agreement([up, [[0.5, 0.5], [0.5, 0.5]]]) is None


def table(*more: Outcome) -> list[Outcome]:
    return [
        outcome(FULL, bits(9, 10), sparsity=0.0),
        outcome("a", bits(8, 10), 0),
        outcome("a", bits(6, 10), 1),
        outcome("b", bits(3, 10)),
        outcome(STREAMING, bits(1, 10), sparsity=1.0),
        *more,
    ]


def test_the_table() -> None:
    rows = compare(table(), "a")
    assert [(row.label, row.sparsity) for row in rows] == [
        (FULL, 0), ("a", 0.5), ("b", 0.5), (STREAMING, 1),
    ]  # fmt: skip
    full, ours, other, streaming = rows
    assert (ours.accuracy, ours.runs) == (pytest.approx(0.7), (0.8, 0.6))
    assert ours.minus_full == pytest.approx(-0.2)
    assert full.minus_full == 0
    assert [row.p for row in (full, ours, streaming)] == [None] * 3
    assert other.p == binomtest(8, 8).pvalue
    assert other.p_problems is not None
    assert (ours.mean_output_tokens, ours.capped_share) == (14.5, 0.1)
    text = markdown(rows, {"a": 0.5, "b": None}, "a")
    assert "| 0.5 | a | 0.700 | 0.800 0.600 | -0.200 | - | - | 14.5 | 0.100 |" in text
    assert "| b | - |" in text
    assert compare(table())[2].p is None


def test_bases_are_pooled_and_must_have_the_same_rows() -> None:
    second = [
        outcome(label, bits(solved, 10), run, "c", sparsity)
        for label, solved, run, sparsity in (
            (FULL, 10, 0, 0.0), ("a", 10, 0, 0.5), ("a", 8, 1, 0.5), ("b", 5, 0, 0.5),
            (STREAMING, 0, 0, 1.0),
        )
    ]  # fmt: skip
    ours = compare(table(*second), "a")[1]
    assert ours.runs == (0.8, 0.6, 1.0, 0.8)
    assert ours.minus_full == pytest.approx(0.8 - 0.95)
    with pytest.raises(RlkvError) as error:
        compare(table(*second[:3], second[4]), "a")
    assert_one_line(error.value, "b at sparsity 0.5", "c")


def test_unknown_reference() -> None:
    with pytest.raises(RlkvError) as error:
        compare(table(), "rlkv")
    assert_one_line(error.value, "--against rlkv", "a, b")
