"""Prefix caching: a beginning that all requests share, and conversations of several turns."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.planning.roofline import Device


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
    columns: ClassVar[Mapping[str, str]] = {
        "kind": "kind",
        "requests": "requests",
        "prefix": "beginning",
        "question": "question",
        "output": "output",
        "turns": "turns",
    }

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """A system prompt with many questions, and a chat."""
        prefix = min(2048 if full else 1024, setup.max_model_len // 2)
        count = 16 if full else 4
        return [
            {
                "kind": kind,
                "requests": count,
                "prefix": prefix,
                "question": 64,
                "output": 16 if kind == "shared" else 32,
                "turns": 1 if kind == "shared" else 3,
            }
            for kind in ("shared", "turns")
        ]

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Every request must fit with its final length."""
        length = point["prefix"] + point["turns"] * (point["question"] + point["output"])
        return setup.lacks(point["requests"], length)

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Only new tokens are computed; all others are found in the cache."""
        seconds = []
        for variant in (STOCK, SPLIT):
            roofline = setup.roofline(device, variant)
            total, known = 0.0, point["prefix"]
            for _ in range(point["turns"]):
                length = known + point["question"]
                total += point["requests"] * roofline.prefill_seconds(length, known)
                mean = length + point["output"] / 2
                total += point["output"] * roofline.decode_seconds(point["requests"], mean)
                known = length + point["output"]
            seconds.append(total)
        return {"seconds": seconds[0] / seconds[1]}

    def turn(self, engine: Engine, point: Point, state: None) -> dict[str, float]:
        """All requests once, or all turns of all conversations."""
        engine.reset_prefix_cache()
        rng = random.Random(5)
        count = point["requests"]
        shared = engine.prompt(point["prefix"], rng)
        if point["kind"] == "shared":
            histories = [shared for _ in range(count)]
        else:
            histories = [engine.prompt(point["prefix"], rng) for _ in range(count)]
        # Not timed: what is in the cache before the requests arrive.
        engine.generate([shared] if point["kind"] == "shared" else histories, 1)
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
