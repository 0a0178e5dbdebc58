import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rlkv_vllm
from rlkv_vllm import cli
from rlkv_vllm.errors import RlkvError
from tests.support import ROOT

HEAVY = {"torch", "vllm", "transformers", "numpy", "pydantic", "matplotlib", "huggingface_hub"}


def run_rlkv(
    *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlkv_vllm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "profile", "testbed", "score", "eval", "compare", "bench", "doctor"):
        assert f" {command} " in result.output


def test_assembling_the_command_imports_nothing_heavy() -> None:
    code = "import sys, rlkv_vllm.cli; print(*{m.split('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(imported)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    result = CliRunner().invoke(cli.app, [flag])
    assert result.exit_code == 0
    assert result.output.strip() == f"rlkv-vllm {rlkv_vllm.__version__}"


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    # The shell is that of the process above.
    command = f"{shlex.quote(sys.executable)} -m rlkv_vllm --install-completion; exit $?"
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    installed = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "complete" in (tmp_path / ".bash_completions" / "rlkv.sh").read_text()
    words = {"_RLKV_COMPLETE": "complete_bash", "COMP_WORDS": "rlkv prof", "COMP_CWORD": "1"}
    completed = subprocess.run(
        [sys.executable, "-m", "rlkv_vllm"],
        capture_output=True,
        text=True,
        env=environment | words,
        timeout=60,
    )
    assert completed.stdout.split() == ["profile"]


#: What the extras bring.
EXTRAS = (
    "accelerate", "datasets", "fastapi", "httpx", "math_verify", "prometheus_client", "starlette",
    "tokenizers", "torch", "transformers", "trl", "vllm",
)  # fmt: skip


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a Python, and of those it starts, that cannot import what extras bring."""
    folder = tmp_path_factory.mktemp("site")
    code = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n"
    (folder / "sitecustomize.py").write_text(code)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("serve --port 0", "cpu"),
        ("serve --mode gated --port 0", "cpu"),
        ("eval --n 1", "cpu"),
        ("bench", "cpu"),
        ("bench --cases decode random:2x2x32", "cpu"),
        ("score embedded -o FOLDER/p.json", "cpu"),
        ("compare -o FOLDER/compare", "cpu"),
        ("testbed train --output FOLDER/model", "cpu"),
        ("train FOLDER/job.yaml", "train"),
        ("refine embedded --model embedded --task embedded -o FOLDER/run", "train"),
        (
            "profile plan embedded embedded --max-model-len 1024 --gpu L4 --rate 1 "
            "--prompt-tokens 9 --output-tokens 9 --simulate",
            "cpu",
        ),
    ],
)
def test_without_extras_a_command_names_the_extra(
    command: str, extra: str, tmp_path: Path, without_extras: dict[str, str]
) -> None:
    result = run_rlkv(*command.replace("FOLDER", str(tmp_path)).split(), env=without_extras)
    assert result.returncode == 2, result.stderr
    *before, error = result.stderr.splitlines()
    said = ("(loading libraries takes some seconds)", "sampling: greedy")
    assert all(any(words in line for words in said) for line in before), result.stderr
    assert f"pip install 'rlkv-vllm[{extra}]'" in error


@pytest.mark.parametrize(
    "command",
    [
        "--version",
        "profile list",
        "profile show embedded",
        "profile validate embedded --model embedded",
        "profile plot embedded -o FOLDER/p.png",
        "profile export embedded -o FOLDER/duo",
        "profile plan embedded embedded --max-model-len 1024 --memory 1GiB",
        "profile plan embedded embedded --max-model-len 1024 --gpu L4 --rate 1 --prompt-tokens 9 "
        "--output-tokens 9",
        "serve --help",
        "testbed sample --n 1",
    ],
)
def test_without_extras_the_rest_works(
    command: str, tmp_path: Path, without_extras: dict[str, str]
) -> None:
    result = run_rlkv(*command.replace("FOLDER", str(tmp_path)).split(), env=without_extras)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["rlkv_vllm.nothing", "nothing", "torch.nothing"])
def test_any_other_missing_module_keeps_its_traceback(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(prog_name: str) -> None:
        importlib.import_module(name)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


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


def test_no_control_code_of_a_message_reaches_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(prog_name: str) -> None:
        raise RlkvError(f"{prog_name} \x1b[31m \x9b2J")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "rlkv: error: rlkv \\x1b[31m \\x9b2J\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(prog_name: str) -> None:
        raise ValueError(prog_name)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(ValueError, match=r"^rlkv$"):
        cli.main()
