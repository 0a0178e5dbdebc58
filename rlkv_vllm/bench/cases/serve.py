"""A server under load, over HTTP, as its users meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Device


class Serve(Case):
    """Random prompts at random times (Poisson), by vLLM's own client."""

    name = "serve"
    title = "A server under load, over HTTP"
    note = (
        "vLLM's server and `rlkv serve`, loaded by the client of `vllm bench serve`: random "
        "prompts, Poisson arrivals. Client and servers share the machine. What the roofline allows "
        "depends on how many requests meet, so it is left out."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ttft_ms", "median TTFT (ms)"),
        Metric("tpot_ms", "median time per token (ms)"),
        Metric("tokens_per_s", "tok/s", more_is_better=True, is_ratio_shown=False),
    )
    columns: ClassVar[Mapping[str, str]] = {
        "rate": "requests/s",
        "requests": "requests",
        "prompt": "prompt",
        "output": "output",
    }
    runs_servers: ClassVar[bool] = True

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Rates from idle to busy."""
        del setup
        rates = (0.5, 1, 2, 4, 8) if full else (1,)
        count = 40 if full else 12
        return [{"rate": r, "requests": count, "prompt": 256, "output": 128} for r in rates]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """The client draws its prompts with the model's tokenizer."""
        if not setup.has_tokenizer:
            return "a model with a tokenizer"
        return setup.lacks(1, point["prompt"] + point["output"])

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Nothing: it depends on how many requests meet."""
        del setup, device, point
        return {}

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        """Measured by the client, in the parent process."""
        raise NotImplementedError
