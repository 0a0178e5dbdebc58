"""Equal memory, long outputs: requests at once and tokens per second with a full pool."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import STOCK, Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine, params
from rlkv_vllm.planning.roofline import Device

PROMPT = 64


class Endless:
    """Endless requests: as many as the pool holds when they are of all ages.

    A pool filled with new requests takes thousands of steps until ages are mixed. So requests of
    a moment in the steady state are sampled and entered into the prefix cache, and as many of
    them are started as vLLM's block managers have room for. A new one replaces each that ends.
    Their total lengths (tokens) are sampled evenly from `shortest` to `longest`.
    """

    def __init__(self, engine: Engine, shortest: int, longest: int) -> None:
        self.engine, self.shortest, self.longest = engine, shortest, longest
        self.rng = random.Random(7)
        most = engine.config.scheduler_config.max_num_seqs
        sampled = [self._sample() for _ in range(most)]
        prompts = [prompt for prompt, _ in sampled]
        engine.reset_prefix_cache()
        # Only to count: they evict each other from the cache.
        needs = engine.enter_into_prefix_cache(prompts)
        left = engine.num_blocks - 1
        self.users = 0
        while self.users < most and needs[self.users] <= left:
            left -= needs[self.users]
            self.users += 1
        self.is_full = self.users < most
        engine.reset_prefix_cache()
        engine.enter_into_prefix_cache(prompts[: self.users])
        for prompt, rest in sampled[: self.users]:
            engine.add(prompt, params(rest))

    def _sample(self) -> tuple[list[int], int]:
        """A request in flight: its tokens so far, and how many are to come."""
        # A longer request is in flight for longer, so it is more likely.
        while True:
            length = self.rng.randint(self.shortest, self.longest)
            if self.rng.random() * self.longest < length:
                break
        # Full blocks of every variant, so that all but the last token is cached.
        age = PROMPT + 64 * (self.rng.randrange(length - PROMPT) // 64)
        return self.engine.prompt(age + 1, self.rng), max(1, length - age - 1)

    def _replace(self) -> None:
        """A new request for each that ended."""
        while len(self.engine.scheduler.requests) < self.users:
            length = self.rng.randint(self.shortest, self.longest)
            self.engine.add(self.engine.prompt(PROMPT, self.rng), params(length - PROMPT))

    def finish_prefill(self) -> None:
        """Step until all requests in flight decode.

        A pool that is full to the last block has evicted some of the prompts: the streaming
        heads' retained tails need blocks beside those that requests hold.
        """
        scheduler = self.engine.scheduler
        quiet = 0
        while quiet < 2:
            self.engine.step()
            self._replace()
            ahead = (r.num_tokens - r.num_computed_tokens for r in scheduler.running)
            quiet = quiet + 1 if all(tokens <= 1 for tokens in ahead) else 0

    def run(self, seconds: float) -> dict[str, float]:
        """Step for so long, and count."""
        scheduler = self.engine.scheduler
        running: list[int] = []
        contexts: list[float] = []
        tokens = preemptions = 0
        start = time.perf_counter()
        while not running or time.perf_counter() - start < seconds:
            requests = list(scheduler.requests.values())  # also counts those that end in the step
            tokens -= sum(request.num_output_tokens for request in requests)
            preemptions -= sum(request.num_preemptions for request in requests)
            self.engine.step()
            tokens += sum(request.num_output_tokens for request in requests)
            preemptions += sum(request.num_preemptions for request in requests)
            running.append(len(scheduler.running))
            contexts.append(
                statistics.fmean(r.num_computed_tokens for r in scheduler.running or requests)
            )
            self._replace()
        took = time.perf_counter() - start
        return {
            "tokens_per_s": tokens / took,
            "running": statistics.fmean(running),
            "context": statistics.fmean(contexts),
            "preemptions": preemptions,
            "steps": len(running),
            "pool_was_full": float(self.is_full),
        }


class Capacity(Case):
    """Two pools of equal size, always full."""

    name = "capacity"
    title = "Equal memory: long outputs, cache-bound"
    note = (
        "Equal bytes of KV cache for both, filled with requests of all ages; a new one replaces "
        "each that ends. A request is prompt (64 tokens) and answer; lengths are sampled evenly "
        "from half the length shown to all of it."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("running", "requests at once", more_is_better=True),
        Metric("tokens_per_s", "tok/s", more_is_better=True),
    )
    columns: ClassVar[dict[str, str]] = {"tokens": "request, up to"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        lengths = (4096, 16384) if full else (4096,)
        fitting = [n for n in lengths if n <= setup.max_model_len]
        return [
            {"tokens": n, "at_once": self.at_once(setup, n), "seconds": setup.turn_seconds}
            for n in fitting or [setup.max_model_len]
        ]

    def at_once(self, setup: Setup, tokens: int) -> dict[str, int]:
        """Requests that hold the pool when they are of all ages, by variant."""
        mean = mean_context(tokens // 2, tokens)
        each = {variant: setup.blocks_per_request(variant, mean) for variant in self.variants}
        fit = {variant: (setup.blocks(variant) - 1) // blocks for variant, blocks in each.items()}
        return {variant: min(setup.max_num_seqs, count) for variant, count in fit.items()}

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Two requests must fit, and the cache must be the limit."""
        if lacks := setup.lacks(2, point["tokens"] - 1):
            return lacks
        if point["at_once"][STOCK] >= setup.max_num_seqs:
            return "a smaller --memory or a larger --max-num-seqs, or the cache is never full"
        return None

    def expected(self, setup: Setup, device: Device, point: Point) -> dict[str, float]:
        """Requests of mean length that the pool holds, stepping at the roofline."""
        mean = mean_context(point["tokens"] // 2, point["tokens"])
        stock, split = counts = [point["at_once"][variant] for variant in self.variants]
        bounds = [setup.roofline(device, variant) for variant in self.variants]
        steps = [b.decode_seconds(n, mean) for b, n in zip(bounds, counts, strict=True)]
        return {"running": split / stock, "tokens_per_s": split / steps[1] / (stock / steps[0])}

    def prepare(self, engine: Engine, point: Point) -> Endless:
        load = Endless(engine, point["tokens"] // 2, point["tokens"])
        load.finish_prefill()
        load.run(point["seconds"] / 2)
        return load

    def turn(self, engine: Engine, point: Point, state: Endless) -> dict[str, float]:
        return state.run(point["seconds"])


def mean_context(shortest: int, longest: int) -> int:
    """Mean current length of the requests in flight: longer ones are in flight for longer."""
    decoded = range(shortest - PROMPT, longest - PROMPT + 1)
    return round(sum(d * (PROMPT + d / 2) for d in decoded) / sum(decoded))
