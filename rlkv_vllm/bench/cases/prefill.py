"""Prefill: time to the first token against the length of the prompt."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Device


class Prefill(Case):
    """One prompt at a time, nothing else running."""

    name = "prefill"
    title = "Prefill: time to the first token"
    note = "One new prompt at a time, one output token. The roofline counts operations."
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("seconds", "TTFT (s)"),)
    columns: ClassVar[Mapping[str, str]] = {"tokens": "prompt"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Prompt lengths."""
        lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768) if full else (512, 2048)
        return [{"tokens": n} for n in lengths if n < setup.max_model_len]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Stock vLLM's cache must hold the prompt."""
        return setup.lacks(1, point["tokens"] + 1)

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Operations of the prompt."""
        stock, split = (
            setup.roofline(device, variant).prefill_seconds(point["tokens"])
            for variant in (STOCK, SPLIT)
        )
        return {"seconds": stock / split}

    def prepare(self, engine: Engine, point: Point) -> None:
        """A first prompt, which is not timed."""
        engine.generate([[5] * min(512, point["tokens"])], 1)

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        """One new prompt."""
        engine.reset_prefix_cache()
        prompt = engine.prompt(point["tokens"], random.Random(point["tokens"]))
        start = time.perf_counter()
        engine.generate([prompt], 1)
        return {"seconds": time.perf_counter() - start}
