"""``--api-server-count 2``: any process answers for all of them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.asking import ask, client_of, problems
from tests.e2e.server import KEY, Server
from tests.e2e.test_monitoring import get, metrics


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(["--api-key", KEY, "--api-server-count", "2"], log) as running:
        yield running


def test_figures_are_those_of_all_processes(server: Server) -> None:
    assert server.output().count("as read back from the engine") == 1
    client = client_of(server)
    before = metrics(server)
    assert before["rlkv:active"] == 1
    assert before["rlkv:cache_used_bytes"] == 0
    seen = set()
    with ThreadPoolExecutor(16) as pool:
        replies = [pool.submit(ask, client, problem) for problem in problems(per_family=8)]
        while not all(reply.done() for reply in replies):
            use = json.loads(get(f"{server.url}/v1/rlkv"))["use"]
            assert use["saved_bytes"] == use["full_cache_bytes"] - sum(use["bytes"].values())
            seen.add((use["blocks"]["full"], use["blocks"]["streaming"]))
    for reply in replies:
        reply.result()
    assert len(seen) > 5
    deadline = time.monotonic() + 10
    while (now := metrics(server))["rlkv:cache_used_bytes"] and time.monotonic() < deadline:
        time.sleep(0.1)
    # New connections spread over the processes: each of them tells the same.
    for _ in range(8):
        now = metrics(server)
        assert now["rlkv:cache_used_bytes"] == now["rlkv:requests_running"] == 0
        assert now["rlkv:active"] == 1
        assert now["rlkv:heads"] == 20
        assert now["rlkv:ring_evictions_total"] > 0
        assert now["rlkv:preemptions_total"] == now["vllm:num_preemptions_total"]
        assert json.loads(get(f"{server.url}/v1/rlkv"))["use"]["blocks"]["full"] == 0
    assert server.stop(signal.SIGTERM) == (0, [])
    assert "Traceback" not in server.output()
