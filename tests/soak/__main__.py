"""Random requests and aborts in a pool sized for constant preemption, compared with a calm run.

    python -m tests.soak --requests 1000 --seeds 1,2,3

Every seed makes its requests (prompts with shared beginnings, penalties, stops, salts, half of
them sampled with a seed of their own), answers them a few at a time in a pool without end and
without prefix caching, then many at once in a pool that holds little more than the longest one,
prompts prefilled in chunks, while some of them are cut off at random:

    engine  in this process; requests are aborted
    server  `rlkv serve` over HTTP; clients vanish

Answers must be token for token those of the calm run, those cut off their beginnings, and the pool
must end as it began. Exit status 1 otherwise. One line of JSON per seed and part.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.engines import engine, pool_is_restored, scheduler, write_profile  # before vLLM

import httpx  # isort: skip
import psutil  # isort: skip

from tests.support.checkpoints import VOCAB, make_checkpoint  # isort: skip
from tests.support.server import Server, metric, wait_for  # isort: skip
from tests.integration.test_parity import UNEVEN  # isort: skip

SINK, WINDOW, BLOCK, CHUNK = 16, 64, 16, 256
MODEL = "soak"


@dataclass(frozen=True)
class Asked:
    """One request and when to cut it off: after so many steps, or parts of the stream."""

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


def sampled(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """The same requests, every other one drawn with a seed of its own."""
    rng = random.Random(seed)
    return [
        request
        if number % 2
        else replace(
            request,
            params=request.params
            | {
                "temperature": rng.uniform(0.3, 1.2),
                "seed": rng.randrange(2**31),
                "top_p": rng.choice([1.0, 0.9]),
                "top_k": rng.choice([0, 20]),
                "min_p": rng.choice([0.0, 0.05]),
            },
        )
        for number, request in enumerate(asked)
    ]


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


async def ask(
    client: httpx.AsyncClient, request: Asked, rng: random.Random
) -> tuple[str, list[int]]:
    """Name and tokens; the connection is closed where the request is cut off."""
    body = request.params | {
        "model": MODEL,
        "prompt": request.prompt,
        "cache_salt": request.salt,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    left = request.abort_after
    if left is not None and left < 10:  # before it has answered
        try:
            await client.post("/v1/completions", json=body, timeout=rng.uniform(0.01, 2))
        except httpx.TimeoutException:
            return request.name, tokens
        left = 0
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                tokens += choice["token_ids"] or []
            if left is not None and (left := left - 1) <= 0:
                break
    return request.name, tokens


async def ask_all(
    url: str, asked: Sequence[Asked], rng: random.Random, at_once: int
) -> dict[str, list[int]]:
    gate = asyncio.Semaphore(at_once)

    async def turn(client: httpx.AsyncClient, request: Asked) -> tuple[str, list[int]]:
        async with gate:
            return await ask(client, request, rng)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        return dict(await asyncio.gather(*(turn(client, request) for request in asked)))


class Found:
    """What a storm did to the answers, to the pool and to the memory."""

    def __init__(self, calm: dict[str, list[int]]) -> None:
        self.calm = calm
        self.wrong: list[str] = []
        self.cut = 0
        self.rss: list[int] = []
        self.start = time.monotonic()

    def part(
        self,
        batch: Sequence[Asked],
        found: dict[str, list[int]],
        *,
        restored: bool,
        processes: Sequence[psutil.Process],
    ) -> None:
        for request in batch:
            want, got = self.calm[request.name], found[request.name]
            if request.abort_after is not None and got != want:
                self.cut += 1
                want = want[: len(got)]
            if got != want:
                self.wrong.append(request.name)
        if not restored:
            self.wrong.append(f"blocks leaked after {batch[-1].name}")
        self.rss.append(sum(process.memory_info().rss for process in processes) >> 20)

    def figures(self) -> dict[str, Any]:
        return {
            "wrong": self.wrong,
            "cut_off": self.cut,
            "rss_mib": self.rss,
            "rss_growth_mib_after_first_part": self.rss[-1] - self.rss[0],
            "seconds": round(time.monotonic() - self.start),
        }


def batches(asked: Sequence[Asked], at_once: int) -> Iterator[Sequence[Asked]]:
    size = max(len(asked) // 10, at_once)
    return (asked[first : first + size] for first in range(0, len(asked), size))


def in_engine(
    paths: tuple[Path, Path], asked: Sequence[Asked], found: Found, rng: random.Random, args: Any
) -> dict[str, Any]:
    """The storm in this process."""
    preempted = 0
    options = sizes(args) | {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": blocks(args),
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": args.at_once,
    }
    with engine(*paths, **options) as llm:
        preempt = scheduler(llm)._preempt_request

        def count(*a: Any, **k: Any) -> None:
            nonlocal preempted
            preempted += 1
            preempt(*a, **k)

        scheduler(llm)._preempt_request = count
        for batch in batches(asked, args.at_once):
            tokens = answer(llm, batch, rng, at_once=args.at_once, aborts=True)
            gc.collect()
            restored = pool_is_restored(llm)
            found.part(batch, tokens, restored=restored, processes=[psutil.Process()])
        del scheduler(llm)._preempt_request
    return {"preemptions": preempted}


def in_server(
    paths: tuple[Path, Path], asked: Sequence[Asked], found: Found, rng: random.Random, args: Any
) -> dict[str, Any]:
    """The storm over HTTP."""
    model, profile = paths
    flags = {
        "--profile": profile,
        "--served-model-name": MODEL,
        "--generation-config": "vllm",
        "--dtype": "float32",
        "--block-size": BLOCK,
        "--max-model-len": sizes(args)["max_model_len"],
        "--num-gpu-blocks-override": blocks(args),
        "--kv-cache-memory-bytes": "64M",
        "--max-num-batched-tokens": CHUNK,
        "--max-num-seqs": args.at_once,
        "--uvicorn-log-level": "error",
    }
    switches = ["--skip-tokenizer-init", "--enforce-eager"]
    words = [str(word) for flag in flags.items() for word in flag]
    with Server([str(model), *switches, *words], model.parent / "log") as server:

        def is_idle() -> bool:
            use = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            return not any(metric(server, f"vllm:{name}") for name in use)

        root = psutil.Process(server.process.pid)
        for batch in batches(asked, args.at_once):
            tokens = asyncio.run(ask_all(server.url, batch, rng, args.at_once))
            found.part(
                batch,
                tokens,
                restored=wait_for(is_idle) and metric(server, "rlkv:cache_used_bytes") == 0,
                processes=[root, *root.children(recursive=True)],
            )
        assert "Traceback" not in server.output(), server.output()
        return {"preemptions": int(metric(server, "vllm:num_preemptions_total"))}


STORMS = {"engine": in_engine, "server": in_server}


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    longest = args.longest + args.tokens + 1
    return {"block_size": BLOCK, "max_model_len": -(-longest // BLOCK) * BLOCK}


def blocks(args: argparse.Namespace) -> int:
    """Of the storm's pool: those of the longest request, and some to quarrel over."""
    return sizes(args)["max_model_len"] // BLOCK + args.spare


def soak(paths: tuple[Path, Path], seed: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    asked = sampled(make_requests(seed, args.requests, args.longest, args.tokens), seed)
    start = time.monotonic()
    with engine(*paths, **sizes(args), kv_cache_memory_bytes=512 << 20) as llm:
        calm = answer(llm, asked, random.Random(seed), at_once=8, aborts=False)
    seconds_calm = round(time.monotonic() - start)
    for name in args.parts.split(","):
        found = Found(calm)
        figures = STORMS[name](paths, asked, found, random.Random(seed + 1), args)
        yield (
            {
                "part": name,
                "seed": seed,
                "requests": len(asked),
                "prompt_tokens": sum(len(request.prompt) for request in asked),
                "tokens": sum(len(calm[request.name]) for request in asked),
                "blocks": blocks(args),
                "seconds_calm": seconds_calm,
            }
            | figures
            | found.figures()
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--parts", default="engine,server")
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
            for result in soak((model, profile), seed, args):
                failed |= bool(result["wrong"]) or not result["preemptions"]
                print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
