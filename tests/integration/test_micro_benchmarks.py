"""The micro-benchmarks that need vLLM run; those of the GPU kernels: tests/unit/kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def run(name: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_attention_layer(tmp_path: Path) -> None:
    flags = "--dtypes float32 --contexts 64 --batches 2 --prefill 96 --chunk 48 --rounds 1"
    run("attention_layer", *flags.split(), "--memory", "0.01", "--output", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [found["step"] for found in rows] == ["decode", "prefill"]
    assert all(found["seconds_per_layer"]["split"] > 0 for found in rows)


def test_scheduler_cost(tmp_path: Path) -> None:
    flags = "--requests 3 --prompt 64 --decode 4 --rounds 1 --sparsities 0.5"
    run("scheduler_cost", *flags.split(), "--output", tmp_path / "s.json")
    figures = json.loads((tmp_path / "s.json").read_text())["median_seconds"]
    assert set(figures) == {"stock", "sparsity 0.5"}
    assert all(seconds > 0 for kinds in figures.values() for seconds in kinds.values())
