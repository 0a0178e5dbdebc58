"""`rlkv bench` on the embedded model, with two engines that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def bench(stem: Path, *flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "rlkv_vllm", "bench", "-o", str(stem), "--threads", "1", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done


def test_measures_reports_and_goes_on(tmp_path: Path) -> None:
    stem = tmp_path / "report"
    small = ("--rounds", "2", "--seconds", "0.5", "--memory", "12MiB", "--max-model-len", "1152")
    small += ("--sparsity", ".2")
    done = bench(stem, "--cases", "capacity,decode", *small)
    assert "points left, about" in done.stderr
    content = json.loads(stem.with_suffix(".json").read_text())
    by_case = {result["case"]: result for result in content["results"]}
    assert set(by_case) == {"capacity", "decode"}
    assert by_case["decode"]["point"] == {"batch": 1, "context": 128, "steps": 4}
    for result in content["results"]:
        assert result["alternating"]
        assert {variant: len(s) for variant, s in result["samples"].items()} == {
            "stock": 2,
            "split": 2,
        }
    capacity = by_case["capacity"]
    for variant, samples in capacity["samples"].items():
        assert all(sample["pool_was_full"] for sample in samples)
        assert all(sample["tokens_per_s"] > 0 for sample in samples)
        mean = sum(sample["running"] for sample in samples) / 2
        assert 0.5 * capacity["point"]["at_once"][variant] < mean
        assert mean < 2 * capacity["point"]["at_once"][variant]
    report = stem.with_suffix(".md").read_text()
    assert "How many more users" in report
    assert "Not run, would need more: batch 8, context 128 (--memory 15MiB)" in report
    assert stem.with_suffix(".png").stat().st_size > 0
    assert not list(tmp_path.glob("*.log"))
    # What is measured is not measured again, so no engine starts.
    again = bench(stem, "--cases", "capacity", *small)
    assert "0 points to measure, 1 already measured" in again.stderr
    assert "started" not in again.stderr
    refused = bench(stem, "--cases", "capacity", *small, "--sparsity", ".5", status=2)
    assert "model.sparsity 0.2 there, 0.5 here" in refused.stderr


@pytest.mark.parametrize("model", ["embedded", "random:2x2x32"])
def test_rollouts_by_vllm_and_by_transformers(model: str, tmp_path: Path) -> None:
    stem = tmp_path / "report"
    small = ("--rounds", "1", "--memory", "64MiB", "--max-model-len", "1152")
    done = bench(stem, model, "--cases", "rollouts", *small)
    assert "vllm rollouts started" in done.stderr
    (result,) = json.loads(stem.with_suffix(".json").read_text())["results"]
    assert result["alternating"]
    assert set(result["samples"]) == {"transformers", "vllm"}
    for (sample,) in result["samples"].values():
        assert sample["tokens_per_s"] > 0
        assert sample["tokens_per_cpu_s"] > 0
        if model == "embedded":
            assert 20 < sample["mean_tokens"] < 200, "answers end by themselves"
        else:
            assert sample["mean_tokens"] == 64
    report = stem.with_suffix(".md").read_text()
    assert "transformers: tok/s | vllm | ratio" in report
    assert not list(tmp_path.glob("*.log"))
