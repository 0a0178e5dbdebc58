"""Routes and metrics of a running server, under load, and a real Prometheus that scrapes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from rlkv_vllm.bench.server import free_port
from rlkv_vllm.serving.status import SplitForecast, SplitStatus
from tests.support.asking import while_answering
from tests.support.server import ANSWER_TIMEOUT_S, KEY, Server, wait_for

METRICS = (
    "active",
    "profile_info",
    "heads",
    "cache_used_bytes",
    "cache_capacity_bytes",
    "full_cache_bytes",
    "cache_saved_bytes",
    "requests_running",
    "requests_possible",
    "ring_evictions_total",
    "preemptions_total",
    "prefix_cache_hit_blocks_total",
)


def get(url: str, key: str | None = KEY) -> str:
    request = urllib.request.Request(url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
        text: str = answer.read().decode()
        return text


def refusal(url: str, key: str | None = KEY) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(url, key)
    return caught.value.code, caught.value.read().decode()


def metrics(server: Server) -> dict[str, float]:
    """Sums over the labels, of vLLM's and ours."""
    sums: dict[str, float] = {}
    for line in get(f"{server.url}/metrics", None).splitlines():
        if match := re.fullmatch(r"((?:vllm|rlkv):[a-z_:]+)(?:\{.*\})? (\S+)", line):
            sums[match[1]] = sums.get(match[1], 0) + float(match[2])
    return sums


def metrics_between_steps(server: Server) -> dict[str, float]:
    """A scrape while the engine is stopped, once all of its steps are recorded."""
    (engine,) = server.children("EngineCore")
    engine.suspend()
    try:
        before = metrics(server)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(0.05)
            now = metrics(server)
            if now == before:
                return now
            before = now
        raise AssertionError("the figures of an engine that stands still go on changing")
    finally:
        engine.resume()


def test_the_json_routes_need_the_key_and_the_page_does_not(server: Server) -> None:
    for route in ("/v1/rlkv", "/v1/rlkv/forecast"):
        for key in (None, "wrong"):
            assert refusal(server.url + route, key)[0] == 401
    page = get(f"{server.url}/rlkv", None)
    assert 'data-key="needed"' in page
    assert KEY not in page


def test_status_and_forecast_are_typed(server: Server) -> None:
    status = SplitStatus.model_validate_json(get(f"{server.url}/v1/rlkv"), strict=True)
    assert status.active
    assert status.models == ["embedded"]
    assert status.use is not None
    most = status.capacity.requests.split
    for requests, fits in ((most, True), (most + 1, False)):
        answer = get(f"{server.url}/v1/rlkv/forecast?requests={requests}")
        assert SplitForecast.model_validate_json(answer, strict=True).fits is fits
    described = json.loads(get(f"{server.url}/openapi.json"))
    for route, schema in (("/v1/rlkv", "SplitStatus"), ("/v1/rlkv/forecast", "SplitForecast")):
        content = described["paths"][route]["get"]["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{schema}")
        assert schema in described["components"]["schemas"]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("tokens=0", "greater than or equal to 1"),
        ("tokens=many", "valid integer"),
        ("tokens=999999", "longest request is 2048 tokens"),
        ("requests=0", "greater than or equal to 1"),
    ],
)
def test_a_wrong_query_is_refused_with_the_reason(server: Server, query: str, reason: str) -> None:
    code, text = refusal(f"{server.url}/v1/rlkv/forecast?{query}")
    assert code == 400
    assert reason in json.loads(text)["error"]["message"]


def test_metrics_agree_with_vllms_own_pool_under_load(
    server: Server, client: openai.OpenAI
) -> None:
    """While steps go on, our metrics agree with each other; while none ends, with vLLM's too.

    vLLM answers /metrics in a thread beside the one that records the steps, and reads metric by
    metric, so a step may end between ours and its own. Hence the engine is stopped for those.
    """
    capacity = metrics(server)["rlkv:cache_capacity_bytes"]
    seen: set[float] = set()
    for _ in while_answering(client, lambda: len(seen) > 5):
        now = metrics(server)
        used = now["rlkv:cache_used_bytes"]
        assert now["rlkv:cache_saved_bytes"] == now["rlkv:full_cache_bytes"] - used
        now = metrics_between_steps(server)
        used = now["rlkv:cache_used_bytes"]
        assert used == pytest.approx(now["vllm:kv_cache_usage_perc"] * capacity, abs=1)
        assert now["rlkv:requests_running"] == now["vllm:num_requests_running"]
        seen.add(used)
    assert len(seen) > 5
    assert wait_for(lambda: metrics(server)["rlkv:cache_used_bytes"] == 0)
    now = metrics(server)
    assert now["rlkv:cache_used_bytes"] == now["rlkv:requests_running"] == 0
    assert now["rlkv:preemptions_total"] == now["vllm:num_preemptions_total"]
    assert now["rlkv:ring_evictions_total"] > 0
    assert now["rlkv:active"] == 1
    use = json.loads(get(f"{server.url}/v1/rlkv"))["use"]
    assert use["blocks"] == {"full": 0, "streaming": 0}


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian package prometheus)")
    return path


def test_promtool_finds_nothing_but_the_colon(server: Server) -> None:
    """vLLM's prefix has one too; promtool would have it left to recording rules."""
    result = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input=get(f"{server.url}/metrics", None),
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = [line for line in (result.stdout + result.stderr).splitlines() if "rlkv:" in line]
    assert len(told) >= len(METRICS)
    assert {line.split(" ", 1)[1] for line in told} == {"metric names should not contain ':'"}


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """A Prometheus that scrapes the server; its address."""
    program = need("prometheus")
    config = tmp_path / "prometheus.yml"
    target = server.url.removeprefix("http://")
    config.write_text(
        "global: {scrape_interval: 2s, scrape_timeout: 2s}\n"
        f"scrape_configs: [{{job_name: rlkv, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    yield f"http://{address}"
    process.terminate()
    process.wait(30)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """What it knows; nothing while it starts, or after a scrape that took too long."""
    quoted = urllib.parse.quote(expression)
    try:
        answer = json.loads(get(f"{prometheus}/api/v1/query?query={quoted}", None))
    except urllib.error.URLError:
        return []
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def series_of(prometheus: str, expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    assert wait_for(lambda: bool(found.extend(query(prometheus, expression)) or found)), expression
    return found


def test_a_real_prometheus_scrapes_every_metric(server: Server, prometheus: str) -> None:
    assert series_of(prometheus, "rlkv:active == 1")
    for name in METRICS:
        for labels in (entry["metric"] for entry in series_of(prometheus, f"rlkv:{name}")):
            assert (labels["model_name"], labels["engine"]) == ("embedded", "0")
    status = json.loads(get(f"{server.url}/v1/rlkv"))
    (capacity,) = series_of(prometheus, "rlkv:cache_capacity_bytes")
    assert float(capacity["value"][1]) == status["capacity"]["bytes"]
    heads = {
        entry["metric"]["kind"]: int(entry["value"][1])
        for entry in series_of(prometheus, "rlkv:heads")
    }
    assert heads == {kind: status["heads"][kind] for kind in ("full", "streaming")}
