"""What the server refuses, seen from outside: one line, a status, and nothing loaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlkv_vllm
from rlkv_vllm.files import write_text_atomic
from tests.support import ROOT
from tests.support.server import RLKV, START_TIMEOUT_S, Server, environment

#: The check of the installation is left out, so that only the proof at start is left.
_WITHOUT_PREFLIGHT = """
import sys
from rlkv_vllm import cli
from rlkv_vllm.serving import preflight, serve
if __name__ == "__main__":
    preflight.check_plugin = lambda: None
    serve.serve = serve.run_server
    cli.main()
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


def break_installation(folder: Path, general_plugin: str) -> str:
    """A PYTHONPATH that hides the plugin's real entry points."""
    info = folder / f"rlkv_vllm-{rlkv_vllm.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: rlkv-vllm\nVersion: {rlkv_vllm.__version__}\n"
    )
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{general_plugin}\n"
        "[vllm.endpoint_plugins]\nrlkv = rlkv_vllm.serving.endpoint:RlkvEndpoint\n"
    )
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_busy_port() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        line = refusal(serve("--host", "127.0.0.1", "--port", str(port)))
    assert f"--port {port}: in use" in line


def test_a_broken_installation_is_refused_before_loading(tmp_path: Path) -> None:
    path = break_installation(tmp_path, "other = json:loads")
    line = refusal(serve(PYTHONPATH=path))
    assert "plugin rlkv of vllm.general_plugins: vLLM finds none" in line


def test_a_profile_replaced_during_the_start(tmp_path: Path) -> None:
    """After the server's checks, before the engine's process reads the file."""
    path, text = tmp_path / "p.json", (ROOT / "head_profiles" / "embedded.json").read_text()
    path.write_text(text)
    server = Server(["--profile", str(path)], tmp_path / "log")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "starting the engine" not in server.output() and time.monotonic() < deadline:
            time.sleep(0.05)
        write_text_atomic(path, text.replace('"window": 16', '"window": 17'))
        assert server.process.wait(START_TIMEOUT_S) == 2
    finally:
        server.kill()
    lines = [line for line in server.output().splitlines() if line.startswith("rlkv: error: ")]
    assert len(lines) == 1, server.output()
    assert f"--profile {path}: changed since the server was started" in lines[0]


def test_workers_with_full_caches_are_refused_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof at start: the plugin loads, but registers nothing."""
    (tmp_path / "idle_plugin.py").write_text("def register(): pass\n")
    path = break_installation(tmp_path, "rlkv = idle_plugin:register")
    script = tmp_path / "serve_unchecked.py"
    script.write_text(_WITHOUT_PREFLIGHT)
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(AssertionError, match="did not start") as caught:
        Server([], tmp_path / "log", [sys.executable, str(script), "serve"]).__enter__()
    output = str(caught.value)
    lines = [line for line in output.splitlines() if line.startswith("rlkv: error: ")]
    assert len(lines) == 1, output
    assert "the KV cache is not split" in lines[0]
    assert "5 attention layers keep full caches" in lines[0]
    assert "ready" not in output
