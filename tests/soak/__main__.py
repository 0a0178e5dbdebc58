"""Random requests and aborts in a pool sized for constant preemption, compared with a calm run.

    python -m tests.soak --requests 1000 --seeds 1,2,3

Every seed makes its requests (prompts with shared beginnings, penalties, stops, salts), answers
them one after another in a pool without end and without prefix caching, then all at once in a
pool that holds little more than the longest one, while some of them are aborted at random.
Answers must be token for token those of the calm run, aborted ones their beginnings, and the pool
must end as it began. Exit status 1 otherwise. One line of JSON per seed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import engine, pool_is_restored, scheduler, write_profile  # before vLLM

import psutil  # isort: skip

from tests.checkpoints import VOCAB, make_checkpoint  # isort: skip
from tests.integration.test_parity import UNEVEN  # isort: skip

SINK, WINDOW, BLOCK = 16, 64, 16


@dataclass(frozen=True)
class Asked:
    """One request and when to abort it, in steps of the engine after it was added."""

    name: str
    prompt: list[int]
    params: dict[str, Any]
    salt: str | None
    abort_after: int | None


def make_requests(seed: int, count: int, longest: int, most_tokens: int) -> list[Asked]:
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, VOCAB) for _ in range(longest)] for _ in range(4)]
    asked = []
    for number in range(count):
        length = min(int(rng.paretovariate(0.6) * 8), longest)
        shared = rng.randrange(length) if rng.random() < 0.5 else 0
        prompt = rng.choice(beginnings)[:shared]
        prompt = prompt + [rng.randrange(3, VOCAB) for _ in range(length - shared)]
        max_tokens = rng.randint(1, most_tokens)
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        # Greedy: vLLM 0.32 cannot rewind a seed's generator on the CPU, and its engine dies of a
        # seeded prompt that is prefilled in chunks. Penalties follow the history all the same.
        if rng.random() < 0.5:
            params |= {
                "presence_penalty": rng.choice([0.0, 0.5]),
                "repetition_penalty": rng.choice([1.0, 1.2]),
                "ignore_eos": rng.random() < 0.5,
            }
        if rng.random() < 0.2:
            params["min_tokens"] = rng.randint(0, max_tokens)
        if rng.random() < 0.2:
            params["stop_token_ids"] = [rng.randrange(3, VOCAB)]
        asked.append(
            Asked(
                str(number),
                prompt,
                params,
                rng.choice([None, None, "a", "b"]),
                rng.randrange(max_tokens + 20) if rng.random() < 0.15 else None,
            )
        )
    return asked


def answer(
    llm: Any, asked: Sequence[Asked], rng: random.Random, *, at_once: int, aborts: bool
) -> dict[str, list[int]]:
    """Tokens by request; of aborted ones what they had."""
    from vllm import SamplingParams

    core = llm.llm_engine
    todo, running = list(reversed(asked)), {}
    tokens: dict[str, list[int]] = {}
    while todo or running:
        while todo and len(running) < at_once and (not running or rng.random() < 0.7):
            request = todo.pop()
            prompt: Any = {"prompt_token_ids": request.prompt}
            if request.salt is not None:
                prompt["cache_salt"] = request.salt
            core.add_request(
                request.name, prompt, SamplingParams(detokenize=False, **request.params)
            )
            running[request.name] = request.abort_after if aborts else None
        for output in core.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            if output.finished:
                running.pop(output.request_id, None)
        for name, left in list(running.items()):
            if left is not None:
                running[name] = left - 1
                if left <= 0:
                    core.abort_request([name], internal=False)
                    tokens.setdefault(name, [])
                    del running[name]
        if not running:
            while core.has_unfinished_requests():  # what an abort left to do
                core.step()
    return tokens


def soak(model: Path, profile: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    asked = make_requests(seed, args.requests, args.longest, args.tokens)
    longest = args.longest + args.tokens + 1
    common: dict[str, Any] = {"block_size": BLOCK, "max_model_len": -(-longest // BLOCK) * BLOCK}
    start = time.monotonic()
    with engine(model, profile, **common, kv_cache_memory_bytes=512 << 20) as llm:
        calm = answer(llm, asked, random.Random(seed), at_once=1, aborts=False)
    calm_s, start = time.monotonic() - start, time.monotonic()

    process, rss, preempted = psutil.Process(), [], 0
    blocks = common["max_model_len"] // BLOCK + args.spare
    options = common | {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": blocks,
        "max_num_batched_tokens": 256,
        "max_num_seqs": args.at_once,
    }
    wrong, aborted = [], 0
    with engine(model, profile, **options) as llm:
        preempt = scheduler(llm)._preempt_request

        def count(*a: Any, **k: Any) -> None:
            nonlocal preempted
            preempted += 1
            preempt(*a, **k)

        scheduler(llm)._preempt_request = count
        rng = random.Random(seed + 1)
        part = max(len(asked) // 10, args.at_once)
        for first in range(0, len(asked), part):
            batch = asked[first : first + part]
            found = answer(llm, batch, rng, at_once=args.at_once, aborts=True)
            for request in batch:
                want, got = calm[request.name], found[request.name]
                if request.abort_after is not None and got != want:
                    aborted += 1
                    want = want[: len(got)]
                if got != want:
                    wrong.append(request.name)
            if not pool_is_restored(llm):
                wrong.append(f"blocks leaked after {request.name}")
            gc.collect()
            rss.append(process.memory_info().rss >> 20)
        del scheduler(llm)._preempt_request
    return {
        "seed": seed,
        "requests": len(asked),
        "tokens": sum(map(len, calm.values())),
        "wrong": wrong,
        "cut_by_abort": aborted,
        "preemptions": preempted,
        "blocks": blocks,
        "rss_mib": rss,
        "rss_growth_mib_after_first_part": rss[-1] - rss[0],
        "seconds_calm": round(calm_s),
        "seconds": round(time.monotonic() - start),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--longest", type=int, default=4000, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=120, help="most tokens of an answer")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--spare", type=int, default=40, help="blocks beyond the longest request")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("qwen3", Path(folder) / "qwen3", max_position_embeddings=8192)
        profile = write_profile(
            model, UNEVEN, Path(folder) / "profile.json", sink=SINK, window=WINDOW
        )
        for seed in map(int, args.seeds.split(",")):
            result = soak(model, profile, seed, args)
            failed |= bool(result["wrong"]) or not result["preemptions"]
            print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
