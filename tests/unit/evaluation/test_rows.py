"""Rows of a profile: replacing, recommending, keeping old files as they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.answers import Sampling
from rlkv_vllm.evaluation.rows import evaluation_row, recommended_sparsity, with_rows
from rlkv_vllm.profile.io import load_profile, profile_text, save_profile
from rlkv_vllm.profile.lookup import packaged_profiles
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.tasks.measurement import Measurement
from tests.support.profiles import make_profile


def row(
    sparsity: float, accuracy: float = 0.97, task: str = "sums", n: int = 300, **more: Any
) -> EvaluationRow:
    figures = {"full_accuracy": 0.97, "mean_output_tokens": 9.0, "capped_share": 0.0}
    figures |= {"full_mean_output_tokens": 9.0, "full_capped_share": 0.0}
    return EvaluationRow(
        **({"task": task, "n": n, "sparsity": sparsity, "accuracy": accuracy} | figures | more)
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([row(0)], None),  # the full cache is no choice
        ([row(0), row(0.2, 0.95), row(0.4, 0.949)], 0.2),
        ([row(0.2, 0.8, full_accuracy=0.82)], 0.2),  # relative to the full cache
        ([row(0.2, n=199)], None),
        ([row(0.4, 0.99), row(0.4, 0.5, task="hard"), row(0.2, 1), row(0.2, 1, task="hard")], 0.2),
        ([row(0.2), row(0.4), row(0.2, task="hard")], 0.2),  # .4 was not measured on both
        ([row(0.8, 0.96), row(0.4, 0.5)], None),  # every smaller one must hold, too
        ([row(0.2), row(0.4, mean_output_tokens=10)], 0.2),  # length explosion
        ([row(0.2), row(0.4, capped_share=0.03)], 0.2),
        ([row(0.2), row(0.4, allocation="0" * 64)], 0.2),  # of other full heads
    ],
)
def test_recommended_sparsity(rows: list[EvaluationRow], expected: float | None) -> None:
    assert recommended_sparsity(make_profile(evaluation=rows)) == expected


def test_rows_replace_those_of_the_same_measurement_only() -> None:
    old = [
        row(0.4, 0.5, seed=1),
        row(0.4, 0.6, n=99, seed=1),
        row(0.4, 0.7, task="other", seed=1),
        row(0.4, 0.9, seed=2),
        row(0.4, 0.9, seed=1, temperature=0.6),
        row(0.4, 0.9, seed=1, top_k=20),
        row(0.4, 0.9, seed=1, samples=4),
        row(0.4, 0.9, seed=1, kv_cache_dtype="fp8"),
        row(0.4, 0.9, seed=1, allocation="0" * 64),
    ]
    new = [row(0.4, 1.0, seed=1), row(0.6, 0.1, seed=1)]
    profile = with_rows(make_profile(evaluation=old), new)
    assert profile.evaluation == [*old[1:], *new]


def test_a_row_says_all_that_was_measured(tmp_path: Path) -> None:
    result = Measurement(
        (True, False, True, True), (10, 20, 30, 40), (False, False, False, True), seconds=6.0
    )
    full = Measurement((False, True, True, True), (10, 10, 10, 10), (False,) * 4, seconds=1.0)
    sampling = Sampling(max_tokens=40, temperature=0.6, top_p=0.95, top_k=20)
    made = evaluation_row(
        "sums", 0.4, result, full, seed=3, sampling=sampling, allocation="a" * 64, level=0.01
    )
    assert made.model_dump() == {
        "task": "sums",
        "n": 4,
        "sparsity": 0.4,
        "accuracy": 0.75,
        "full_accuracy": 0.75,
        "mean_output_tokens": 25.0,
        "p95_output_tokens": 40,
        "capped_share": 0.25,
        "max_tokens": 40,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "seconds_per_solved": 2.0,
        "seed": 3,
        "full_mean_output_tokens": 10.0,
        "full_capped_share": 0.0,
        "allocation": "a" * 64,
        "paired": {
            "gained": 1,
            "lost": 1,
            "newly_cut": 1,
            "no_longer_cut": 0,
            # Residuals -15, -5, 5, 15 of a ratio 2.5: its variance is .4167. An answer of 40
            # tokens more adds .375 to the ratio: z = 2.326, and .3190 =
            # log(1 + (.375 z^2 / 2 + z sqrt(.4167 + .375^2)) / 2.5) / z.
            "tokens_error": pytest.approx(0.31904, abs=1e-5),
            "level": 0.01,
        },
    }
    profile = make_profile(evaluation=[made])
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile


def test_a_row_of_several_samples() -> None:
    result = Measurement(
        (True, True, False, False), (1, 2, 3, 4), (False, False, True, True), samples=2
    )
    full = Measurement((True,) * 6, (1,) * 6, (False,) * 6, samples=2)  # answered one problem more
    sampling = Sampling(max_tokens=40)
    made = evaluation_row("sums", 0.4, result, full, seed=3, sampling=sampling)
    assert (made.n, made.samples, made.accuracy, made.full_accuracy) == (2, 2, 0.5, 1)
    assert made.paired is not None
    assert (made.paired.lost, made.paired.newly_cut) == (2, 2)
    assert made.paired.design_effect == 2  # both answers to a problem alike


def test_nothing_solved_has_no_time_per_solved() -> None:
    assert Measurement((False,), (5,), (True,), seconds=2.0).seconds_per_solved is None


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
