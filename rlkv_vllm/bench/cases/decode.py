"""Fixed batch: the time of a decode step against context and batch."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine, params
from rlkv_vllm.planning.roofline import Device

#: Contexts are entered into the prefix cache, not computed: full blocks of every variant.
BASE_CONTEXT = 128
STEPS = 4
#: Most steps of one point, first ones and turns together.
STEP_BUDGET = 192


class Decode(Case):
    """Steps of requests that all have the same context."""

    name = "decode"
    title = "Fixed batch: decode step"
    note = (
        "All requests have the same context, entered into the prefix cache without being computed. "
        "The roofline is that of the step with its weights, on this machine."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "step (ms)", scale=1e3),)
    columns: ClassVar[Mapping[str, str]] = {"batch": "batch", "context": "context"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Batches and contexts; longer contexts are compared with the shortest of their batch."""
        batches = (1, 4, 8, 16, 32, 64) if full else (1, 8)
        contexts = (1024, 2048, 4096, 8192, 16384, 32768) if full else (1024, 4096, 8192)
        return [
            {"batch": batch, "context": context, "steps": STEPS}
            for batch in batches
            for context in (BASE_CONTEXT, *contexts)
            if context + STEP_BUDGET <= setup.max_model_len
        ]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Stock vLLM's cache must hold the batch, or its requests would be preempted."""
        return setup.lacks(point["batch"], point["context"] + STEP_BUDGET)

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """The step with its weights, and what a longer context adds to it."""
        stock, split = (setup.roofline(device, variant) for variant in (STOCK, SPLIT))
        batch, context = point["batch"], point["context"]
        expected = {
            "seconds": stock.decode_seconds(batch, context) / split.decode_seconds(batch, context)
        }
        added = [
            r.cache.head_tokens(context) - r.cache.head_tokens(BASE_CONTEXT) for r in (stock, split)
        ]
        if all(added):
            expected["attention"] = added[0] / added[1]
        return expected

    def prepare(self, engine: Engine, point: Point) -> None:
        """Start the batch and let it take a few steps."""
        engine.reset_prefix_cache()
        rng = random.Random(point["context"])
        # One token more than is cached: a context of full blocks leaves nothing to prefill.
        prompts = [engine.prompt(point["context"] + 1, rng) for _ in range(point["batch"])]
        sampling = params(STEP_BUDGET)
        engine.enter_into_prefix_cache(prompts)
        for prompt in prompts:
            engine.add(prompt, sampling)
        engine.run_until_decoding(point["batch"])
        for _ in range(2):
            engine.step()

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        """Mean time of a few steps."""
        start = time.perf_counter()
        for _ in range(point["steps"]):
            engine.step()
        seconds = (time.perf_counter() - start) / point["steps"]
        assert len(engine.scheduler.running) == point["batch"], "a request ended or was preempted"
        return {"seconds": seconds}
