"""What long jobs print into a file, and their last lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from rlkv_vllm import cli
from rlkv_vllm.cli.progress import StageProgress
from tests.support.profiles import make_profile


def test_a_stage_has_a_line_per_step_and_a_hundred_at_most(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with StageProgress() as progress:
        for step in range(1, 4):
            progress.report("answering", step, 3, f"{step} solved")
        for step in range(1, 1001):
            progress.report("scoring", step, 1000)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = [re.sub(r"[\d.]+ s$", "N s", line) for line in text.splitlines()]
    assert lines[:4] == [
        "answering: 1/3, 1 solved, N s",
        "answering: 2/3, 2 solved, N s",
        "answering: 3/3, 3 solved, N s",
        "scoring: 1/1000, N s",
    ]
    assert lines[-1] == "scoring: 1000/1000, N s"
    assert len(lines) <= 3 + 101


ROW = {
    "reward": 0.75,
    "loss": 0.0123,
    "gate_mean": 0.9,
    "output_tokens": 99.6,
    "seconds": 2.04,
}


def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Any, more: str = "") -> Result:
    """`rlkv train` with a job of two steps that is done at once."""
    job = pytest.importorskip("rlkv_vllm.training.job", exc_type=ImportError)

    def run(config: Any, *, listener: Any, **_: Any) -> Any:
        for step in (1, 2):
            listener.on_step({**ROW, "step": step, "elapsed": 60.0 * step}, 2)
        return profile

    monkeypatch.setattr(job, "run", run)
    path = tmp_path / "job.yaml"
    path.write_text(f"output: {tmp_path / 'my run'}\nmodel: org/model\n{more}")
    result = CliRunner().invoke(cli.app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    return result


def test_a_training_step_is_a_line_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = train(monkeypatch, tmp_path, None)
    assert result.stderr.splitlines() == [
        "step 1/2: reward 0.75, loss 0.0123, gates 0.90, 100 tokens, 2.0 s, 1.0 min left",
        "step 2/2: reward 0.75, loss 0.0123, gates 0.90, 100 tokens, 2.0 s, 0.0 min left",
    ]
    assert result.stdout == "", "other processes of `accelerate launch` have no profile"


def test_a_job_ends_with_the_commands_to_run_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    *_, evaluate, serve = train(monkeypatch, tmp_path, make_profile()).stdout.splitlines()
    path = tmp_path / "my run" / "profile.json"
    assert evaluate == f"next: rlkv eval org/model --profile '{path}' --max-tokens 7168"
    assert serve == f"  or: rlkv serve org/model --profile '{path}'"
    more = "revision: v1\ntask: {name: 'q.jsonl', answer_column: a}\n"
    more += "trainer: {max_completion_length: 99}\n"
    bare = make_profile(evaluation=[], recommended_sparsity=None)
    *_, evaluate, serve = train(monkeypatch, tmp_path, bare, more).stdout.splitlines()
    given = ["rlkv", "serve", "org/model", "--profile", str(path)]
    assert shlex.split(serve)[1:] == [*given, "--revision", "v1", "--sparsity", "0.5"]
    command = typer.main.get_command(cli.app).commands["eval"]  # type: ignore[attr-defined]
    parsed = command.make_context("eval", shlex.split(evaluate)[3:]).params
    assert (parsed["model"], parsed["profile"]) == ("org/model", [str(path)])
    assert (parsed["task"], parsed["answer_column"], parsed["max_tokens"]) == ("q.jsonl", "a", 99)
