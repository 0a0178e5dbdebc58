"""The first line of long commands comes before the imports that take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.test_main import HEAVY

SCRIPT = """
import sys
from rlkv_vllm.cli import app, quick

def print_modules(*_, **__):
    print(*{name.split(".")[0] for name in sys.modules})
    raise SystemExit(7)

quick.typer.echo = print_modules
app(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["bench", "compare", "eval", "score"])
@pytest.mark.parametrize("flags", [("--quick",), ("-o", "out.json")])
def test_first_line_comes_before_heavy_imports(
    command: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, *flags],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    heavy = HEAVY - {"pydantic"}  # which typer imports itself
    assert not heavy & set(done.stdout.split())
    assert not list(tmp_path.iterdir())  # checked without leaving anything
