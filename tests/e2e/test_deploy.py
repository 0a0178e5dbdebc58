"""deploy/'s smoke test, health check and monitoring against real servers: split, and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkv_vllm import models
from rlkv_vllm.serving import healthcheck
from tests.support.deploy import DEPLOY, metric_names
from tests.support.server import ANSWER_TIMEOUT_S, Server

KEY = "a key with spaces"


def smoke(server: Server, key: str | None) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}
    if key is not None:
        variables["VLLM_API_KEY"] = key
    return subprocess.run(
        [DEPLOY / "smoke.sh", server.url],
        env=variables | {"TIMEOUT": "30"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As compose.yaml starts it."""
    log = tmp_path_factory.mktemp("split") / "log"
    config = DEPLOY / "serve" / "embedded.yaml"
    with Server(["--config", str(config), "--api-key", KEY], log) as server:
        yield server


def test_a_split_server_passes(split: Server) -> None:
    result = smoke(split, KEY)
    assert result.returncode == 0, result.stderr
    assert "the cache is split: 16 full and 4 streaming KV heads" in result.stdout
    assert "embedded answers" in result.stdout
    assert healthcheck.problem(split.url, KEY) is None


def test_a_wrong_key_is_told(split: Server) -> None:
    for key in (None, "wrong"):
        result = smoke(split, key)
        assert result.returncode == 2
        assert "set VLLM_API_KEY" in result.stderr
        assert "set VLLM_API_KEY" in str(healthcheck.problem(split.url, key))


def test_dashboard_and_alerts_use_metrics_that_the_server_has(split: Server) -> None:
    with urllib.request.urlopen(f"{split.url}/metrics", timeout=ANSWER_TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    served = {line.split("{")[0] for line in lines if not line.startswith("#")}
    assert metric_names() - served == set()


def test_ctrl_c_ends_an_idle_server_at_once(split: Server) -> None:
    children = split.children()
    split.process.send_signal(signal.SIGINT)
    assert split.end_of(children) == (0, [])
    assert "force killing" not in split.output()


def test_a_server_without_the_plugin_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's own server with the plugin taken away by hand."""
    flags = {
        "--model": str(models.model_dir()),
        "--served-model-name": models.MODEL_NAME,
        "--dtype": "float32",
        "--kv-cache-memory-bytes": "64M",
        "--additional-config": json.dumps({"rlkv": {"profile": "embedded"}}),
    }
    arguments = ["--enforce-eager", *(part for flag in flags.items() for part in flag)]
    command = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry")
    without = Server(arguments, tmp_path / "log", command=command, VLLM_PLUGINS="")
    with without as server:
        result = smoke(server, None)
        assert result.returncode == 2
        assert "without the plugin" in result.stderr
        assert "full caches" in str(healthcheck.problem(server.url, None))
