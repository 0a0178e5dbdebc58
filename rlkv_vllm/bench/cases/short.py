"""Where a split cache saves nothing and must not lose: short, all heads full, start-up."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import ALL_FULL, STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Device, Roofline


class Short(Case):
    """Complete answers to short prompts, with room for all of them."""

    name = "short"
    title = "Memory-ample, short context"
    note = "New prompts, all at once; the time is that of the batch, prefill included."
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("tokens_per_s", "tok/s", more_is_better=True),)
    columns: ClassVar[dict[str, str]] = {"batch": "batch", "prompt": "prompt", "output": "output"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        batches = (1, 8, 32) if full else (4,)
        return [{"batch": batch, "prompt": 64, "output": 256} for batch in batches]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Half of stock vLLM's cache stays free."""
        length = point["prompt"] + point["output"]
        return setup.lacks(point["batch"], length) or setup.lacks(2 * point["batch"], length)

    def seconds(self, roofline: Roofline, point: Point) -> float:
        prefill = roofline.prefill_seconds(point["prompt"]) * point["batch"]
        step = roofline.decode_seconds(point["batch"], point["prompt"] + point["output"] / 2)
        return prefill + point["output"] * step

    def prepare(self, engine: Engine, point: Point) -> None:
        engine.generate([[5 + i] * point["prompt"] for i in range(point["batch"])], 4)

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        engine.reset_prefix_cache()
        rng = random.Random(11)
        prompts = [engine.prompt(point["prompt"], rng) for _ in range(point["batch"])]
        start = time.perf_counter()
        engine.generate(prompts, point["output"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens_per_s": point["batch"] * point["output"] / seconds}


class Overhead(Short):
    """The same answers from a split engine without streaming heads."""

    name = "overhead"
    title = "All heads full: the plugin's own cost"
    note = "A profile at sparsity 0 computes what stock vLLM computes, on one cache layer per head."
    variants: ClassVar[tuple[str, str]] = (STOCK, ALL_FULL)

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        prompts = [n for n in (64, 1024) if n + 64 < setup.max_model_len]
        return [{"batch": 4, "prompt": prompt, "output": 64} for prompt in prompts]


class Startup(Case):
    """A new process for every turn, timed around the engine's start."""

    name = "startup"
    title = "Start-up"
    note = (
        "`engine`: `vllm.LLM(...)` until it returns, as `vllm bench startup` counts. `process`: "
        "from the start of Python to the first token. There is no roofline: equal is 1."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("engine_seconds", "engine (s)"),
        Metric("process_seconds", "process (s)"),
    )
    starts_engines: ClassVar[bool] = True

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        return [{}]

    def expected(self, setup: Setup, device: Device, point: Point) -> dict[str, float]:
        """The plugin reads a profile and no weights: as fast as stock vLLM."""
        return {"engine_seconds": 1.0, "process_seconds": 1.0}
