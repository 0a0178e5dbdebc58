"""``--api-server-count 2``: any process answers for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.test_monitoring import get, metrics
from tests.support.asking import client_of, while_answering
from tests.support.drain import check_drain
from tests.support.server import KEY, Server, wait_for


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
    seen: set[tuple[int, int]] = set()
    for _ in while_answering(client, lambda: len(seen) > 5):
        use = json.loads(get(f"{server.url}/v1/rlkv"))["use"]
        seen.add((use["blocks"]["full"], use["blocks"]["streaming"]))
    assert len(seen) > 5
    assert wait_for(lambda: metrics(server)["rlkv:cache_used_bytes"] == 0)
    # New connections spread over the processes: each of them tells the same.
    for _ in range(8):
        now = metrics(server)
        assert now["rlkv:cache_used_bytes"] == now["rlkv:requests_running"] == 0
        assert now["rlkv:active"] == 1
        assert now["rlkv:heads"] == 20
        assert now["rlkv:ring_evictions_total"] > 0
        assert now["rlkv:preemptions_total"] == now["vllm:num_preemptions_total"]
        assert json.loads(get(f"{server.url}/v1/rlkv"))["use"]["blocks"]["full"] == 0
    check_drain(server, client)
