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
from common import conditions, header, parser, row, write_json
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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
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
        # What the engine makes of the model's cache specs, at a size that is never short.
        (cache,) = get_kv_cache_configs(config, [cache_specs(config)], [64 << 30])
        self.num_groups = len(cache.kv_cache_groups)
        self.block_size = cache.kv_cache_groups[0].kv_cache_spec.block_size
        config.cache_config.num_gpu_blocks = cache.num_blocks
        config.cache_config.block_size = self.block_size
        cls = Scheduler if sparsity is None else SplitScheduler
        manager = StructuredOutputManager(config)
        self.scheduler = cls(config, cache, manager, block_size=self.block_size, log_stats=True)
        self.hasher = get_request_block_hasher(self.block_size, sha256)
        self.seconds: dict[str, list[float]] = defaultdict(list)  # CPU time of steps by kind

    def serve(self, args: argparse.Namespace, label: str, round_: int) -> None:
        """Serve all requests once."""
        rng = random.Random(round_)
        params = SamplingParams(temperature=0, max_tokens=args.decode, ignore_eos=True)
        params.update_from_generation_config({}, 2)
        for i in range(args.requests):
            prompt = [rng.randrange(5, 4000) for _ in range(args.prompt)]
            name = f"{label}-{round_}-{i}"
            request = Request(name, prompt, params, None, block_hasher=self.hasher)
            self.scheduler.add_request(request)
        gc.collect()
        gc.disable()
        admission = 0.0
        while self.scheduler.has_unfinished_requests():
            waiting = len(self.scheduler.waiting)
            start = time.thread_time()
            output = self.scheduler.schedule()
            scheduled = output.num_scheduled_tokens
            answer = ModelRunnerOutput(
                req_ids=list(scheduled),
                req_id_to_index={name: i for i, name in enumerate(scheduled)},
                sampled_token_ids=[[7] for _ in scheduled],
            )
            self.scheduler.update_from_output(output, answer)
            took, tokens = time.thread_time() - start, output.total_num_scheduled_tokens
            if waiting or tokens > args.requests:
                admission += took
            elif len(self.scheduler.running) == args.requests:
                self.seconds["decode step"].append(took)
            else:
                self.seconds["last step (all requests end)"].append(took)
        gc.enable()
        self.seconds[f"admission of a request ({label})"].append(admission / args.requests)


def cache_specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """The specs of the model's layers or, with a split, of their heads."""
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(SHAPE.layers)]
    plan = split_plan(config)
    if plan is None:
        spec = FullAttentionSpec(
            block_size=config.cache_config.block_size,
            num_kv_heads=SHAPE.kv_heads,
            head_size=SHAPE.head_dim,
            dtype=torch.bfloat16,
        )
        return dict.fromkeys(names, spec)
    attention = SimpleNamespace(
        get_attn_backend=lambda: SplitCPUBackend,
        num_heads=SHAPE.q_heads,
        head_size=SHAPE.head_dim,
        kv_cache_torch_dtype=torch.bfloat16,
    )
    for name in names:
        register_head_caches(plan, config, name, attention, rank=0)
    context = config.compilation_config.static_forward_context
    return {n: c.spec for n, c in context.items() if isinstance(c, HeadCacheLayer)}


def main() -> None:
    options = parser(__doc__, requests=256, prompt=512, sparsities="0.5,0.8", rounds=3)
    options.add_argument("--decode", type=int, default=128, help="decode steps, one token each")
    options.add_argument("--output", type=Path, help="write the figures as JSON")
    args = options.parse_args()
    register()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SHAPE, folder, sink=16, window=64)
        variants = {"stock": None} | {f"sparsity {s}": float(s) for s in args.sparsities.split(",")}
        engines = {n: Engine(args, folder, sparsity) for n, sparsity in variants.items()}
    for round_ in range(args.rounds):
        for label in ("new prompt", "prefix cache hit"):
            for engine in engines.values():
                engine.serve(args, label, round_)
    medians = {
        variant: {kind: statistics.median(took) for kind, took in engine.seconds.items()}
        for variant, engine in engines.items()
    }
    where = conditions(args)
    print("Microseconds of CPU time.\n")
    print(header("variant", "groups", "block", *medians["stock"]))
    for variant, engine in engines.items():
        figures = (f"{took * 1e6:.0f}" for took in medians[variant].values())
        print(row([variant, engine.num_groups, engine.block_size, *figures]))
    write_json(args.output, where | {"median_seconds": medians})


if __name__ == "__main__":
    main()
