"""Servers under load, over HTTP, and what metrics and status pages cost them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from rlkv_vllm.bench.case import STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.server import Server

METRICS, STATUS = "/metrics", "/v1/rlkv"
#: Reads by which the CPU time of one is measured.
READS = 200


class Serve(Case):
    """Random prompts at random times (Poisson), by vLLM's own client."""

    name = "serve"
    title = "A server under load, over HTTP"
    note = (
        "vLLM's server and `rlkv serve`, loaded by the client of `vllm bench serve`: random "
        "prompts, Poisson arrivals. Client and servers share the machine. There is no roofline: "
        "it depends on how many requests overlap."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ttft_ms", "median TTFT (ms)"),
        Metric("tpot_ms", "median time per token (ms)"),
        Metric("tokens_per_s", "tok/s", more_is_better=True, is_ratio_shown=False),
    )
    columns: ClassVar[dict[str, str]] = {
        "rate": "requests/s",
        "requests": "requests",
        "prompt": "prompt",
        "output": "output",
    }
    runs = "server"

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        rates = (0.5, 1, 2, 4, 8) if full else (1,)
        count = 40 if full else 12
        return [{"rate": r, "requests": count, "prompt": 256, "output": 128} for r in rates]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """The client makes its prompts with the model's tokenizer."""
        if not setup.has_tokenizer:
            return "a model with a tokenizer"
        return setup.lacks(point.get("at_once", 1), point["prompt"] + point["output"])

    def prepare(self, engine: Server, point: Point) -> Any:
        engine.load(**point | {"requests": 2})

    def turn(self, engine: Server, point: Point, state: Any) -> dict[str, float]:
        found = engine.load(**point)
        return {
            "ttft_ms": found["median_ttft_ms"],
            "tpot_ms": found["median_tpot_ms"],
            "p99_tpot_ms": found["p99_tpot_ms"],
            "tokens_per_s": found["output_throughput"],
        }


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
        load = {"requests": 64 if full else 32, "prompt": 64, "output": 64, "at_once": 16}
        pages = (METRICS, STATUS, "/version") if full else (METRICS, STATUS)
        return [{"path": path, "scrapes": 50} | load for path in pages]

    def prepare(self, engine: Server, point: Point) -> None:
        """All requests once: in every turn their prompts are in the prefix cache."""
        _load(engine, point)

    def turn(self, engine: Server, point: Point, state: Any) -> dict[str, float]:
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
    cpu = server.cpu_seconds() - before
    return found["output_throughput"], cpu / found["total_output_tokens"]
