from typer.testing import CliRunner

from rlkv_vllm.cli import app
from rlkv_vllm.serving import serve as serve_module


def test_serve_hands_every_argument_on_in_order(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(serve_module, "serve", lambda arguments: seen.extend(arguments) or 0)
    arguments = ["org/model", "-tp", "2", "--sparsity", ".5", "--max_model_len=4k", "--a.b", "1"]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0
    assert seen == arguments


def test_exit_status_of_the_server_is_the_commands(monkeypatch) -> None:
    monkeypatch.setattr(serve_module, "serve", lambda arguments: 3)
    assert CliRunner().invoke(app, ["serve"]).exit_code == 3


def test_help_needs_no_vllm(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(app, ["serve", flag])
        assert result.exit_code == 0
        for option in ("--profile", "--sparsity", "--sink", "--window", "--api-key"):
            assert option in result.output
