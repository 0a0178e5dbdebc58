"""Rows of a profile: replacing, recommending, keeping old files as they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rlkv_vllm.answers import Sampling
from rlkv_vllm.evaluation.rows import evaluation_row, recommended_sparsity, with_rows
from rlkv_vllm.profile.io import load_profile, profile_text, save_profile
from rlkv_vllm.profile.lookup import packaged_profiles
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.tasks.measurement import Measurement
from tests.support.profiles import make_profile


def row(sparsity: float, accuracy: float, task: str = "sums", n: int = 100) -> EvaluationRow:
    return EvaluationRow(
        task=task,
        n=n,
        sparsity=sparsity,
        accuracy=accuracy,
        full_accuracy=0.97,
        mean_output_tokens=9.0,
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([row(0, 0.94)], None),
        ([row(0, 1), row(0.2, 0.95), row(0.4, 0.949)], 0.2),
        ([row(0.4, 0.99), row(0.4, 0.5, task="hard"), row(0.2, 1)], 0.2),
        ([row(0.8, 0.96), row(0.4, 0.5)], 0.8),
    ],
)
def test_recommended_sparsity(rows: list[EvaluationRow], expected: float | None) -> None:
    assert recommended_sparsity(rows) == expected


def test_rows_replace_those_of_the_same_measurement_only() -> None:
    old = [row(0.4, 0.5), row(0.4, 0.6, n=99), row(0.4, 0.7, task="other"), row(0.2, 0.96)]
    profile = with_rows(make_profile(evaluation=old), [row(0.4, 1.0), row(0.6, 0.1)])
    assert profile.evaluation == [*old[1:], row(0.4, 1.0), row(0.6, 0.1)]
    assert profile.recommended_sparsity == 0.2


def test_a_row_says_all_that_was_measured(tmp_path: Path) -> None:
    result = Measurement((True, False, True, True), (10, 20, 30, 40), capped=1, seconds=6.0)
    full = Measurement((True,) * 4, (1,) * 4, capped=0, seconds=1.0)
    sampling = Sampling(max_tokens=40, temperature=0.6)
    made = evaluation_row("sums", 0.4, result, full, seed=3, sampling=sampling)
    assert made.model_dump() == {
        "task": "sums",
        "n": 4,
        "sparsity": 0.4,
        "accuracy": 0.75,
        "full_accuracy": 1.0,
        "mean_output_tokens": 25.0,
        "p95_output_tokens": 40,
        "capped_share": 0.25,
        "max_tokens": 40,
        "temperature": 0.6,
        "seconds_per_solved": 2.0,
        "seed": 3,
    }
    profile = make_profile(evaluation=[made])
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile


def test_nothing_solved_has_no_time_per_solved() -> None:
    assert Measurement((False,), (5,), capped=1, seconds=2.0).seconds_per_solved is None


def test_files_without_the_new_fields_keep_text_and_digest() -> None:
    old = make_profile()  # its row has the old fields only
    raw = json.loads(profile_text(old))
    assert set(raw["evaluation"][0]) == {
        "task",
        "n",
        "sparsity",
        "accuracy",
        "full_accuracy",
        "mean_output_tokens",
    }
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert old.sha256() == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("path", packaged_profiles().values(), ids=str)
def test_packaged_profiles_are_written_as_they_are_read(path: Path) -> None:
    assert profile_text(load_profile(path)) == path.read_text()
