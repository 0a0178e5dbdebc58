"""What the split cache costs vLLM's scheduler: CPU time per step, without a model.

    taskset -c 1 python benchmarks/scheduler_cost.py

The scheduler, block pool and block managers of a model of real size run with the cache groups of
the split; their steps are answered at once. Requests are admitted, decode and end, and come again
with the same prompts (prefix cache hits). Stock vLLM and the split caches take turns. Times are CPU
time of the one thread that schedules.

Prints a table of medians, writes JSON with --output.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import environment, header, parser, row, write_json
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rlkv_vllm.bench.random_model import parse_shape, write_model
from rlkv_vllm.engine.cache.head_cache import HeadCacheLayer, register_head_caches
from rlkv_vllm.engine.cache.scheduler import SplitScheduler
from rlkv_vllm.engine.config import split_plan
from rlkv_vllm.engine.cpu.backend import SplitCPUBackend
from rlkv_vllm.plugin import register

SHAPE = parse_shape("random:28x8x128")


def parse_args() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--requests", type=int, default=256)
    found.add_argument("--prompt", type=int, default=512)
    found.add_argument("--decode", type=int, default=128, help="decode steps, one token each")
    found.add_argument("--sparsities", default="0.5,0.8")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--output", type=Path, help="write the figures as JSON")
    return found.parse_args()


class Engine:
    """A scheduler whose steps are answered at once."""

    def __init__(self, args: argparse.Namespace, folder: Path, sparsity: float | None) -> None:
        rlkv = {"profile": str(folder / "profile.json"), "sparsity": sparsity}
        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=32768,
            max_num_seqs=args.requests,
            max_num_batched_tokens=8192,
            additional_config={} if sparsity is None else {"rlkv": rlkv},
        ).create_engine_config()
        config.cache_config.kv_cache_layout = "LBHNC"
        self.cache = cache_of(config)
        self.block_size = self.cache.kv_cache_groups[0].kv_cache_spec.block_size
        config.cache_config.num_gpu_blocks = self.cache.num_blocks
        config.cache_config.block_size = self.block_size
        cls = Scheduler if sparsity is None else SplitScheduler
        self.scheduler = cls(
            config,
            self.cache,
            StructuredOutputManager(config),
            block_size=self.block_size,
            log_stats=True,
        )
        self.hasher = get_request_block_hasher(self.block_size, sha256)

    def step(self) -> tuple[float, int]:
        """Schedule a step and take its tokens; CPU seconds and scheduled tokens."""
        start = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        answer = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={name: i for i, name in enumerate(scheduled)},
            sampled_token_ids=[[7] for _ in scheduled],
        )
        self.scheduler.update_from_output(output, answer)
        return time.thread_time() - start, output.total_num_scheduled_tokens

    def serve(self, args: argparse.Namespace, label: str, round_: int) -> dict[str, list[float]]:
        """Serve all requests once; CPU seconds of the steps by kind."""
        rng = random.Random(round_)
        params = SamplingParams(temperature=0, max_tokens=args.decode, ignore_eos=True)
        params.update_from_generation_config({}, 2)
        for i in range(args.requests):
            self.scheduler.add_request(
                Request(
                    request_id=f"{label}-{round_}-{i}",
                    prompt_token_ids=[rng.randrange(5, 4000) for _ in range(args.prompt)],
                    sampling_params=params,
                    pooling_params=None,
                    block_hasher=self.hasher,
                )
            )
        seconds: dict[str, list[float]] = defaultdict(list)
        gc.collect()
        gc.disable()
        admission = 0.0
        while self.scheduler.has_unfinished_requests():
            waiting = len(self.scheduler.waiting)
            took, tokens = self.step()
            if waiting or tokens > args.requests:
                admission += took
            elif len(self.scheduler.running) == args.requests:
                seconds["decode step"].append(took)
            else:
                seconds["last step (all requests end)"].append(took)
        gc.enable()
        seconds[f"admission of a request ({label})"].append(admission / args.requests)
        return seconds


def cache_of(config: VllmConfig) -> KVCacheConfig:
    """What the engine would make of the model's cache specs, at a size that is never short."""
    plan = split_plan(config)
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(SHAPE.layers):
        name = f"model.layers.{layer}.self_attn.attn"
        if plan is None:
            specs[name] = FullAttentionSpec(
                block_size=config.cache_config.block_size,
                num_kv_heads=SHAPE.kv_heads,
                head_size=SHAPE.head_dim,
                dtype=torch.bfloat16,
            )
        else:
            attention = SimpleNamespace(
                get_attn_backend=lambda: SplitCPUBackend,
                num_heads=SHAPE.q_heads,
                head_size=SHAPE.head_dim,
                kv_cache_torch_dtype=torch.bfloat16,
            )
            register_head_caches(plan, config, name, attention, rank=0)
    context = config.compilation_config.static_forward_context
    specs |= {n: c.spec for n, c in context.items() if isinstance(c, HeadCacheLayer)}
    (cache,) = get_kv_cache_configs(config, [specs], [64 << 30])
    return cache


def main() -> None:
    args = parse_args()
    register()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SHAPE, folder, sink=16, window=64)
        variants = {"stock": None} | {f"sparsity {s}": float(s) for s in args.sparsities.split(",")}
        engines = {n: Engine(args, folder, sparsity) for n, sparsity in variants.items()}
    seconds: dict[str, dict[str, list[float]]] = {n: defaultdict(list) for n in engines}
    for round_ in range(args.rounds):
        for label in ("new prompt", "prefix cache hit"):
            for variant, engine in engines.items():
                for kind, took in engine.serve(args, label, round_).items():
                    seconds[variant][kind] += took
    medians = {
        variant: {kind: statistics.median(took) for kind, took in kinds.items()}
        for variant, kinds in seconds.items()
    }
    where = environment()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    print(", ".join(f"{key} {value}" for key, value in (settings | where).items()))
    print("Microseconds of CPU time.\n")
    print(header("variant", "groups", "block", *medians["stock"]))
    for variant, engine in engines.items():
        figures = (f"{took * 1e6:.0f}" for took in medians[variant].values())
        print(row([variant, len(engine.cache.kv_cache_groups), engine.block_size, *figures]))
    if args.output:
        figures = {"environment": where, "settings": settings, "median_seconds": medians}
        write_json(args.output, figures)


if __name__ == "__main__":
    main()
