"""Prefix caching: a beginning that all requests share, and conversations of several turns."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Roofline


class Prefix(Case):
    """Requests that find most of their prompt in the cache."""

    name = "prefix"
    title = "Prefix caching: shared beginnings and several turns"
    note = (
        "`shared`: one request brings the beginning into the cache, then all others arrive at "
        "once, with different ends. `turns`: conversations that resend their history, one turn of "
        "all conversations after the other. Hit: share of the prompt tokens found in the cache."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("seconds", "seconds"),
        Metric("hit", "hit (%)", more_is_better=True, scale=100, is_ratio_shown=False),
    )
    columns: ClassVar[dict[str, str]] = {
        "kind": "kind",
        "requests": "requests",
        "prefix": "beginning",
        "question": "question",
        "output": "output",
        "turns": "turns",
    }

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        prefix = min(2048 if full else 1024, setup.max_model_len // 2)
        both = {"requests": 16 if full else 4, "prefix": prefix, "question": 64}
        shared, turns = {"output": 16, "turns": 1}, {"output": 32, "turns": 3}
        return [{"kind": "shared"} | both | shared, {"kind": "turns"} | both | turns]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        length = point["prefix"] + point["turns"] * (point["question"] + point["output"])
        return setup.lacks(point["requests"], length)

    def seconds(self, roofline: Roofline, point: Point) -> float:
        """Only new tokens are computed; all others are found in the cache."""
        total, known = 0.0, point["prefix"]
        for _ in range(point["turns"]):
            length = known + point["question"]
            total += point["requests"] * roofline.prefill_seconds(length, known)
            mean = length + point["output"] / 2
            total += point["output"] * roofline.decode_seconds(point["requests"], mean)
            known = length + point["output"]
        return total

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        engine.reset_prefix_cache()
        rng = random.Random(5)
        count = point["requests"]
        shared = engine.prompt(point["prefix"], rng)
        histories = [shared] * count
        if point["kind"] == "turns":
            histories = [engine.prompt(point["prefix"], rng) for _ in range(count)]
        # Not timed: what is in the cache before the requests arrive.
        engine.generate(histories if point["kind"] == "turns" else [shared], 1)
        cached = tokens = 0
        start = time.perf_counter()
        for _ in range(point["turns"]):
            histories = [old + engine.prompt(point["question"], rng) for old in histories]
            outputs = engine.generate(histories, point["output"])
            cached += sum(output.num_cached_tokens or 0 for output in outputs)
            tokens += sum(map(len, histories))
            histories = [
                old + list(output.outputs[0].token_ids)
                for old, output in zip(histories, outputs, strict=True)
            ]
        return {"seconds": time.perf_counter() - start, "hit": cached / tokens}
