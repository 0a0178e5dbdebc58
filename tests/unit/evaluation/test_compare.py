"""Comparison of scorers: pooled tests, the table, and the benchmark that fills it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.testbed.tokenizer import build_tokenizer
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS, make_checkpoint
from tests.support.profiles import assert_one_line, make_profile, random_gates
from tests.support.scripts import load_benchmark


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


# --- the benchmark -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    return load_benchmark("compare_scorers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> list[Path]:
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(512)
    folders = []
    for seed in (0, 1):
        path = make_checkpoint("qwen3", tmp_path_factory.mktemp(f"base{seed}"), seed=seed)
        model = AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        folders.append(path)
    return folders


def write_profiles(model: Path, folder: Path) -> list[str]:
    fingerprint = load_model_fingerprint(str(model))
    names = []
    for i, label in enumerate(("x", "x", "y")):
        path = folder / f"{label}{i}.json"
        gates = random_gates(NUM_LAYERS, NUM_KV_HEADS, seed=i)
        save_profile(
            make_profile(model=fingerprint, gates=gates, sink=2, window=5, evaluation=[]), path
        )
        names.append(f"{label}={path}")
    return names


def test_the_benchmark_measures_continues_and_merges(
    script: Any, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    outputs = []
    for i, model in enumerate(models):
        output = tmp_path / f"base{i}.json"
        command = [
            str(model), *write_profiles(model, tmp_path), "--sparsity", ".5", "--n", "3",
            "--task", "hops", "--max-new-tokens", "4", "--against", "x", "--output", str(output),
        ]  # fmt: skip
        script.main(script.parse_args(command))
        outputs.append(output)
    first = json.loads(outputs[0].read_text())
    assert [(run["label"], run["run"]) for run in first["runs"]] == [
        (FULL, 0), ("x", 0), ("x", 1), ("y", 0), (STREAMING, 0),
    ]  # fmt: skip
    assert all(len(run["correct"]) == 3 for run in first["runs"])
    assert len(json.loads(outputs[0].with_suffix(".cache.json").read_text())) == 5
    assert first["rank_agreement"]["y"] is None

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("rlkv_vllm.hf.answers.solve", fail)
    outputs[1].unlink()
    script.main(script.parse_args(command))
    capsys.readouterr()
    both = tmp_path / "both.json"
    script.main(
        script.parse_args(["--merge", *map(str, outputs), "--against", "x", "--output", str(both)])
    )
    merged = json.loads(both.read_text())
    assert [len(row["runs"]) for row in merged["table"]] == [2, 4, 2, 2]
    assert capsys.readouterr().out == both.with_suffix(".md").read_text()
    with pytest.raises(RlkvError) as error:
        script.main(
            script.parse_args(["--merge", str(outputs[0]), str(outputs[0]), "--output", str(both)])
        )
    assert_one_line(error.value, "same base model")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["x"], ["x: give LABEL=PROFILE"]),
        ([f"{FULL}=p.json"], [FULL, "baseline"]),
        (["x=missing.json"], ["missing.json"]),
    ],
)
def test_bad_profiles(script: Any, tmp_path: Path, args: list[str], parts: list[str]) -> None:
    with pytest.raises(RlkvError) as error:
        script.main(script.parse_args(["embedded", *args, "--output", str(tmp_path / "o.json")]))
    assert_one_line(error.value, *parts)


def test_problems_that_gates_were_made_from_are_refused(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(make_profile(), path)  # seed 1
    command = ["embedded", f"x={path}", "--seed", "1", "--output", str(tmp_path / "o.json")]
    with pytest.raises(RlkvError) as error:
        script.main(script.parse_args(command))
    assert_one_line(error.value, "--seed 1", "x")
