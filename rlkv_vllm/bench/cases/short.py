"""Short context with memory to spare: a split cache saves nothing here, and must not lose."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Device


class Short(Case):
    """Complete answers to short prompts, with room for all of them."""

    name = "short"
    title = "Memory-ample, short context"
    note = "New prompts, all at once; the time is that of the batch, prefill included."
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("tokens_per_s", "tok/s", more_is_better=True),)
    columns: ClassVar[Mapping[str, str]] = {
        "batch": "batch",
        "prompt": "prompt",
        "output": "output",
    }

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Answers of 256 tokens."""
        batches = (1, 8, 32) if full else (4,)
        return [{"batch": batch, "prompt": 64, "output": 256} for batch in batches]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Half of stock vLLM's cache stays free."""
        length = point["prompt"] + point["output"]
        return setup.lacks(point["batch"], length) or setup.lacks(2 * point["batch"], length)

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Prefill, then steps of growing context."""
        seconds = []
        for variant in self.variants:
            roofline = setup.roofline(device, variant)
            prefill = roofline.prefill_seconds(point["prompt"]) * point["batch"]
            step = roofline.decode_seconds(point["batch"], point["prompt"] + point["output"] / 2)
            seconds.append(prefill + point["output"] * step)
        return {"tokens_per_s": seconds[0] / seconds[1]}

    def prepare(self, engine: Engine, point: Point) -> None:
        """A first batch of this size, which is not timed."""
        engine.generate([[5 + i] * point["prompt"] for i in range(point["batch"])], 4)

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        """One batch of new prompts."""
        engine.reset_prefix_cache()
        rng = random.Random(11)
        prompts = [engine.prompt(point["prompt"], rng) for _ in range(point["batch"])]
        start = time.perf_counter()
        engine.generate(prompts, point["output"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens_per_s": point["batch"] * point["output"] / seconds}
