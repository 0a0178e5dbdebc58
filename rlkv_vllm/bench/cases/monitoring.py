"""What metrics and status pages cost a running server."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from rlkv_vllm.bench.case import STOCK, Metric, Point, Setup
from rlkv_vllm.bench.cases.serve import Serve
from rlkv_vllm.bench.server import Server

METRICS, STATUS = "/metrics", "/v1/rlkv"
#: Reads by which the CPU time of one is measured.
READS = 200


class Monitoring(Serve):
    """Each server under the same load, without scrapes and with many."""

    name = "monitoring"
    title = "Monitoring: what scraping costs"
    note = (
        f"Each server is compared with itself: the same load without scrapes, then with them. "
        f"`{STATUS}` exists only with the plugin, so stock vLLM answers `{METRICS}` there. "
        f"`/version` answers a constant: no page costs less. CPU time is that of all processes of "
        f"a server; that of a scrape is measured without load."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("scrape_cpu_ms", "CPU per scrape (ms)"),
        Metric("speed", "tok/s, of that without scrapes", more_is_better=True),
        Metric("token_cpu", "CPU per token, of that without scrapes", is_ratio_shown=False),
        Metric("tokens_per_s", "tok/s without", more_is_better=True, is_ratio_shown=False),
        Metric("token_cpu_us", "CPU per token without (us)", is_ratio_shown=False),
    )
    columns: ClassVar[dict[str, str]] = {"path": "page", "scrapes": "a second"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Pages; the load is the same for all."""
        load = {"requests": 64 if full else 32, "prompt": 64, "output": 64, "at_once": 16}
        pages = (METRICS, STATUS, "/version") if full else (METRICS, STATUS)
        return [{"path": path, "scrapes": 50} | load for path in pages]

    def prepare(self, engine: Server, point: Point) -> None:
        """All requests once: in every turn their prompts are in the prefix cache."""
        _load(engine, point)

    def turn(self, engine: Server, point: Point, state: Any) -> dict[str, float]:
        """The load without scrapes and with them, then scrapes alone."""
        is_status_of_stock = engine.variant == STOCK and point["path"] == STATUS
        path = METRICS if is_status_of_stock else point["path"]
        speed, cpu = _load(engine, point)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            scraping = pool.submit(engine.scrape, path, point["scrapes"], stop=stop)
            try:
                speed_scraped, cpu_scraped = _load(engine, point)
            finally:
                stop.set()
            scraping.result()
        before = engine.cpu_seconds()
        engine.scrape(path, math.inf, stop=threading.Event(), limit=READS)
        return {
            "scrape_cpu_ms": 1e3 * (engine.cpu_seconds() - before) / READS,
            "speed": speed_scraped / speed,
            "token_cpu": cpu_scraped / cpu,
            "tokens_per_s": speed,
            "token_cpu_us": 1e6 * cpu,
        }


def _load(server: Server, point: Point) -> tuple[float, float]:
    """Tokens per second, and CPU seconds of the server per token."""
    before = server.cpu_seconds()
    load = {name: point[name] for name in ("requests", "prompt", "output", "at_once")}
    found = server.load(rate=math.inf, **load)
    return found["output_throughput"], (server.cpu_seconds() - before) / found[
        "total_output_tokens"
    ]
