"""benchmarks/gpu_engine.py works: in toy size, on the CPU engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

BENCHMARK = ROOT / "benchmarks" / "gpu_engine.py"


def run(out: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--tiny", "--out", str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_measures_reports_and_goes_on(tmp_path: Path) -> None:
    run(tmp_path, "--only", "s=.8", "--time-limit", "600")
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["part"] for r in results] == ["decode", "decode", "capacity", "finished"]
    assert all(r["machine"]["dry_run"] for r in results)
    decode, capacity = results[0], results[2]
    assert decode["seconds"] > 0
    assert decode["implementation"] == "SplitCPUImpl"
    assert capacity["tokens_per_s"] > 0
    assert capacity["pool_was_full"]
    report = (tmp_path / "report.md").read_text()
    assert "Dry run" in report
    assert "| split s=.8 |" in report
    assert (tmp_path / "report.png").stat().st_size > 0
    # Again: what is done is not done twice, and a run that is out of time starts nothing.
    again = run(tmp_path, "--only", "s=.", "--time-limit", "1")
    assert "split s=.5 waits for the next run" in again
    assert "split s=.8 waits" not in again
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(results)
