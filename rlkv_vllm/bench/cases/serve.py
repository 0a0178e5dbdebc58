"""A server under load, over HTTP, as its users meet it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.server import Server


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
    runs_servers: ClassVar[bool] = True

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Rates from idle to busy."""
        rates = (0.5, 1, 2, 4, 8) if full else (1,)
        count = 40 if full else 12
        return [{"rate": r, "requests": count, "prompt": 256, "output": 128} for r in rates]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """The client makes its prompts with the model's tokenizer."""
        if not setup.has_tokenizer:
            return "a model with a tokenizer"
        return setup.lacks(point.get("at_once", 1), point["prompt"] + point["output"])

    def prepare(self, engine: Server, point: Point) -> Any:
        """Two requests, which are not timed."""
        engine.load(**point | {"requests": 2})

    def turn(self, engine: Server, point: Point, state: Any) -> dict[str, float]:
        """All requests once."""
        found = engine.load(**point)
        return {
            "ttft_ms": found["median_ttft_ms"],
            "tpot_ms": found["median_tpot_ms"],
            "p99_tpot_ms": found["p99_tpot_ms"],
            "tokens_per_s": found["output_throughput"],
        }

    def finish(self, engine: Server, state: Any) -> None:
        """Nothing: all requests are answered."""
