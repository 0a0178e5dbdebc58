"""`rlkv score`: its help, and how settings of a scorer are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkv_vllm import cli
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.scorers import METHODS
from tests.support import profiles
from tests.support.profiles import assert_one_line


def test_help_lists_every_method_with_its_summary() -> None:
    result = CliRunner().invoke(cli.app, ["score", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name, summary in METHODS.items():
        assert f"{name}: {summary}" in result.output


def test_help_loads_no_scorer() -> None:
    code = (
        "import sys, rlkv_vllm.scorers; from rlkv_vllm.cli.score import score; "
        "print(*(name for name in sys.modules if name.startswith(('torch', 'rlkv_vllm.scorers.'))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["steps"], ["--set steps", "key=value"]),
        (["pace=3"], ["--set pace", "self-distill has no such setting", "steps (", "reg ("]),
        (["steps=many"], ["--set: steps: ", "integer", "many"]),
        (["steps=5", "reg=-.1"], ["--set: reg: ", "greater than or equal to 0", "-0.1"]),
    ],
)
def test_wrong_settings_are_refused(settings: list[str], parts: list[str]) -> None:
    args = [arg for setting in settings for arg in ("--set", setting)]
    result = CliRunner().invoke(
        cli.app, ["score", "embedded", "-o", "p.json", "--method", "self-distill", *args]
    )
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, *parts)


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "p.json", Path("/proc/p.json")):
        result = CliRunner().invoke(cli.app, ["score", "embedded", "-o", str(output)])
        assert isinstance(result.exception, RlkvError)
        assert_one_line(result.exception, f"--output {output}", "cannot be written")
        assert result.output == ""  # before anything starts


def test_quick_needs_no_other_argument(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlkv_vllm.scorers import run

    configs: list[run.ScoreConfig] = []

    def make_profile(config: run.ScoreConfig, *_: object, **__: object) -> HeadProfile:
        configs.append(config)
        return profiles.make_profile()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "make_profile", make_profile)
    result = CliRunner().invoke(cli.app, ["score", "--quick", "--evaluate", "8"])
    assert result.exit_code == 0, result.exception
    (config,) = configs
    assert (config.model, config.n, config.evaluate) == ("embedded", 16, 8)
    first, second, *_ = result.stderr.splitlines()
    assert first.startswith("--quick: --output quick-profile.json, --n 16 instead of 128, ")
    assert "--evaluate" not in first
    assert second.startswith("scoring the heads of embedded with greedy: 16 problems")
    last = result.stdout.splitlines()[-1]
    assert last == "next: rlkv eval embedded --profile quick-profile.json --quick"
