"""What the server refuses, seen from outside: one line, a status, and nothing loaded."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rlkv_vllm
from tests.e2e.server import RLKV, START_TIMEOUT_S, Server, environment

#: The check of the installation is left out, so that only the proof at start is left.
_WITHOUT_PREFLIGHT = """
from rlkv_vllm.serving import preflight
from rlkv_vllm.cli import main
if __name__ == "__main__":
    preflight.check_plugin = lambda: None
    main()
"""


def serve(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RLKV, "serve", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The line of the error, after checking that nothing else went wrong."""
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "loading weights" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("rlkv: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def break_installation(folder: Path, general_plugin: str) -> Path:
    """A folder that, first on the path, hides the plugin's real entry points."""
    info = folder / f"rlkv_vllm-{rlkv_vllm.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: rlkv-vllm\nVersion: {rlkv_vllm.__version__}\n"
    )
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{general_plugin}\n"
        "[vllm.endpoint_plugins]\nrlkv = rlkv_vllm.serving.endpoint:RlkvEndpoint\n"
    )
    return folder


def test_busy_port() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        line = refusal(serve("--host", "127.0.0.1", "--port", str(port)))
    assert f"--port {port}: in use" in line


def test_sparsity_out_of_range() -> None:
    assert "--sparsity 1.5" in refusal(serve("--sparsity", "1.5"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "specul"),
        (["--max-model-len", "9999999"], "max_model_len"),
        (["--block-size", "24"], "--block-size 24"),
        (["--reasoning-parser", "mind_reader"], "mind_reader"),
    ],
)
def test_what_vllm_or_the_split_refuses_is_one_line(arguments: list[str], named: str) -> None:
    assert named in refusal(serve(*arguments))


def test_a_broken_installation_is_refused_before_loading(tmp_path: Path) -> None:
    folder = break_installation(tmp_path, "other = json:loads")
    line = refusal(serve(PYTHONPATH=str(folder)))
    assert "plugin rlkv of vllm.general_plugins: vLLM finds none" in line


def test_workers_with_whole_caches_are_refused_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof at start: the plugin loads, but registers nothing."""
    (tmp_path / "idle_plugin.py").write_text("def register(): pass\n")
    folder = break_installation(tmp_path, "rlkv = idle_plugin:register")
    script = tmp_path / "serve_unchecked.py"
    script.write_text(_WITHOUT_PREFLIGHT)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(AssertionError, match="did not start") as caught:
        Server([], tmp_path / "log", [sys.executable, str(script), "serve"]).__enter__()
    output = str(caught.value)
    lines = [line for line in output.splitlines() if line.startswith("rlkv: error: ")]
    assert len(lines) == 1, output
    assert "the KV cache is not split, so this server does not start" in lines[0]
    assert "5 attention layers keep whole caches" in lines[0]
    assert "ready" not in output
