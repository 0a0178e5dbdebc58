"""`rlkv score`: its help, and how settings of a scorer are given."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlkv_vllm import cli
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.scorers import METHODS
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
