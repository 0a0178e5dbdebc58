import subprocess
import sys

import pytest
from typer.testing import CliRunner

import rlkv_vllm
from rlkv_vllm import cli
from rlkv_vllm.errors import RlkvError

HEAVY = {"torch", "vllm", "transformers", "numpy", "pydantic", "matplotlib", "huggingface_hub"}


def run_rlkv(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlkv_vllm", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "profile", "testbed", "score", "eval", "bench", "doctor"):
        assert f" {command} " in result.output


def test_assembling_the_command_imports_nothing_heavy() -> None:
    code = "import sys, rlkv_vllm.cli; print(*{m.split('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(imported)


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"rlkv-vllm {rlkv_vllm.__version__}"


def test_a_mistake_is_one_line_on_stderr_and_status_2() -> None:
    result = run_rlkv("serve", "some/model", "--profile", "no_such_profile.json")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("rlkv: error: profile no_such_profile.json: no such file")


def test_a_pydantic_error_never_leaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlkv_vllm.profile import ModelFingerprint

    def app(prog_name: str) -> None:
        ModelFingerprint.model_validate({"id": prog_name})

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    captured = capsys.readouterr().err
    assert captured.startswith("rlkv: error: ModelFingerprint: model_type: Field required")
    assert captured.count("\n") == 1


def test_a_message_of_several_lines_is_joined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(prog_name: str) -> None:
        raise RlkvError(f"{prog_name}\n  two\nlines")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "rlkv: error: rlkv two lines\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(prog_name: str) -> None:
        raise ValueError(prog_name)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(ValueError, match=r"^rlkv$"):
        cli.main()
