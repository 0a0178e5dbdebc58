"""Time of a decode step against context and batch, and of a prefill against its prompt."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine, params
from rlkv_vllm.planning.roofline import Device, Roofline

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
    columns: ClassVar[dict[str, str]] = {"batch": "batch", "context": "context"}

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

    def seconds(self, roofline: Roofline, point: Point) -> float:
        return roofline.decode_seconds(point["batch"], point["context"])

    def expected(self, setup: Setup, device: Device, point: Point) -> dict[str, float]:
        """The step with its weights, and what a longer context adds to it."""
        caches = (setup.roofline(device, variant).cache for variant in self.variants)
        added = [c.head_tokens(point["context"]) - c.head_tokens(BASE_CONTEXT) for c in caches]
        attention = {"attention": added[0] / added[1]} if all(added) else {}
        return super().expected(setup, device, point) | attention

    def prepare(self, engine: Engine, point: Point) -> None:
        engine.reset_prefix_cache()
        rng = random.Random(point["context"])
        # One token more than is cached: a context of full blocks leaves nothing to prefill.
        prompts = [engine.prompt(point["context"] + 1, rng) for _ in range(point["batch"])]
        engine.enter_into_prefix_cache(prompts)
        for prompt in prompts:
            engine.add(prompt, params(STEP_BUDGET))
        engine.run_until_decoding(point["batch"])
        for _ in range(2):
            engine.step()

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(point["steps"]):
            engine.step()
        seconds = (time.perf_counter() - start) / point["steps"]
        assert len(engine.scheduler.running) == point["batch"], "a request ended or was preempted"
        return {"seconds": seconds}


class Prefill(Case):
    """One prompt at a time, nothing else running."""

    name = "prefill"
    title = "Prefill: time to the first token"
    note = "One new prompt at a time, one output token. The roofline counts operations."
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "TTFT (s)"),)
    columns: ClassVar[dict[str, str]] = {"tokens": "prompt"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768) if full else (512, 2048)
        return [{"tokens": n} for n in lengths if n < setup.max_model_len]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        return setup.lacks(1, point["tokens"] + 1)

    def seconds(self, roofline: Roofline, point: Point) -> float:
        return roofline.prefill_seconds(point["tokens"])

    def prepare(self, engine: Engine, point: Point) -> None:
        engine.generate([[5] * min(512, point["tokens"])], 1)

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        engine.reset_prefix_cache()
        prompt = engine.prompt(point["tokens"], random.Random(point["tokens"]))
        start = time.perf_counter()
        engine.generate([prompt], 1)
        return {"seconds": time.perf_counter() - start}
