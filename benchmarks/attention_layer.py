"""Attention of one layer on the CPU: split cache against stock vLLM, in one process, no model.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/attention_layer.py

Both are the attention implementations that the engine runs, with their work per step, on random
keys in a cache of as many layers as fit in --memory (at most 28, so that small caches do not stay
in the processor's cache). They take turns. The column "bytes" is the roofline: bytes of keys and
values that stock reads over those that the split reads.

Prints a table of medians per layer, writes JSON with --output.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import BlockTable, Requests, conditions, header, parser, row, write_json
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

from rlkv_vllm.allocation.forecast import CacheGeometry
from rlkv_vllm.engine.cache.head_cache import HeadCacheLayer, HeadGroup, LayerHeads
from rlkv_vllm.engine.cpu.backend import SplitCPUImpl
from rlkv_vllm.engine.cpu.heads import SplitMetadata

#: CPU time of one thread, for machines with other work.
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

STOCK_BLOCK = 128  # vLLM's default on the CPU
MAX_LAYERS = 28

#: An attention layer whose cache is not quantised.
LAYER: Any = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)

#: Queries, keys and values of a step.
QKV = list[torch.Tensor]


def metadata(requests: Requests, blocks: BlockTable) -> dict[str, Any]:
    return {
        "num_actual_tokens": requests.batch * requests.new,
        "max_query_len": requests.new,
        "query_start_loc": requests.starts,
        "seq_lens": requests.lengths,
        "block_table": blocks.table,
        "slot_mapping": blocks.slots,
    }


@functools.cache
def empty_config() -> VllmConfig:
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # all that is asked of it
    return config


def empty_impl(args: argparse.Namespace) -> SplitCPUImpl:
    """The backend's implementation; without a plan it is vLLM's own."""
    with set_current_vllm_config(empty_config()):
        scale = args.head_dim**-0.5
        return SplitCPUImpl(args.q_heads, args.head_dim, scale, args.kv_heads, None, None, "auto")


def filled(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, repeated: sampling all takes longer than the measurement."""
    size, pattern = math.prod(shape), torch.randn(1 << 20).to(dtype)
    return pattern.repeat(size // len(pattern) + 1)[:size].view(shape)


def stock_step(
    args: argparse.Namespace, requests: Requests, qkv: QKV, layers: int
) -> Callable[[], None]:
    """One step of stock vLLM in all layers."""
    dtype, output = qkv[0].dtype, torch.empty_like(qkv[0])
    blocks = requests.block_table(STOCK_BLOCK)
    isa = _get_attn_isa(dtype, STOCK_BLOCK, args.head_dim)
    shape = (blocks.num_blocks, args.kv_heads, STOCK_BLOCK, 2 * args.head_dim)
    caches = [filled(*shape, dtype=dtype) for _ in range(layers)]
    impl = empty_impl(args)
    layer: Any = SimpleNamespace(isa=isa, **vars(LAYER))
    attend = super(SplitCPUImpl, impl).forward

    def run() -> None:
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=requests.batch,
            num_heads=args.q_heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            seq_lens=requests.lengths,
            dtype=dtype,
            query_start_loc=requests.starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        step = CPUAttentionMetadata(
            **metadata(requests, blocks), max_seq_len=requests.context, scheduler_metadata=schedule
        )
        for cache in caches:
            impl.do_kv_cache_update(layer, qkv[1], qkv[2], cache, blocks.slots)
            attend(layer, *qkv, cache, step, output)

    return run


def split_step(
    args: argparse.Namespace, requests: Requests, qkv: QKV, full_heads: list[list[int]]
) -> Callable[[], None]:
    """One step of the split cache in all layers, each with its full heads."""
    dtype, output = qkv[0].dtype, torch.empty_like(qkv[0])
    size, spans = args.block_size, (args.sink, args.window)
    tables = {"full": requests.block_table(size), "ring": requests.block_table(size, *spans)}
    geometry = CacheGeometry(
        len(full_heads), args.kv_heads, args.head_dim, dtype.itemsize, size, *spans
    )

    def group(name: str, heads: list[int]) -> HeadGroup | None:
        if not heads:
            return None
        shape = (len(heads), tables[name].num_blocks, 1, size, 2 * args.head_dim)
        layers = tuple(HeadCacheLayer(None, args.q_heads, None) for _ in heads)  # type: ignore[arg-type]
        for layer, cache in zip(layers, filled(*shape, dtype=dtype), strict=True):
            layer.kv_cache = cache
        return HeadGroup(tuple(heads), (name,) * len(heads), layers)

    impls = []
    for full in full_heads:
        impl = empty_impl(args)
        impl.plan = SimpleNamespace(geometry=geometry)  # type: ignore[assignment]
        streaming = group("ring", [h for h in range(args.kv_heads) if h not in full])
        impl.heads = LayerHeads(group("full", full), (streaming,) if streaming else ())
        impl.prepare(dtype)
        impls.append(impl)

    def run() -> None:
        step = {
            name: SplitMetadata(**metadata(requests, blocks)) for name, blocks in tables.items()
        }
        context: Any = SimpleNamespace(attn_metadata=step)
        with override_forward_context(context):
            for impl in impls:
                impl.forward(LAYER, *qkv, torch.empty(0), step["full"], output)

    return run


def measure(
    args: argparse.Namespace, step: str, cases: list[Requests], dtype: torch.dtype
) -> dict[str, Any]:
    """Median seconds per layer of the cases together, and the roofline."""
    d, kv_heads = args.head_dim, args.kv_heads
    layer_bytes = max(case.batch * case.context for case in cases) * cache_bytes(args, dtype)
    layers = max(1, min(MAX_LAYERS, int(args.memory * 2**30 / layer_bytes)))
    # Uneven layers, as profiles have them, with exactly the given sparsity.
    heads = [(layer, h) for layer in range(layers) for h in range(kv_heads)]
    full = random.Random(0).sample(heads, round(len(heads) * (1 - args.sparsity)))
    full_heads = [sorted(h for at, h in full if at == layer) for layer in range(layers)]
    steps: dict[str, list[Callable[[], None]]] = {"stock": [], "split": []}
    read = dict.fromkeys(steps, 0)
    for case in cases:
        qkv = [
            torch.randn(case.batch * case.new, n, d, dtype=dtype)
            for n in (args.q_heads, kv_heads, kv_heads)
        ]
        steps["stock"].append(stock_step(args, case, qkv, layers))
        steps["split"].append(split_step(args, case, qkv, full_heads))
        seen = range(case.context - case.new + 1, case.context + 1)  # tokens, by query
        by_full = case.batch * sum(seen)
        by_ring = case.batch * sum(min(i, args.sink + args.window) for i in seen)
        read["stock"] += len(heads) * by_full
        read["split"] += len(full) * by_full + (len(heads) - len(full)) * by_ring
    clock = CLOCKS[args.clock]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + 1):
        for name, runs in steps.items():
            start = clock()
            for once in runs:
                once()
            if turn:  # the first one warms up
                times[name].append((clock() - start) / layers)
    medians = {name: statistics.median(took) for name, took in times.items()}
    ratio, roofline = medians["stock"] / medians["split"], read["stock"] / read["split"]
    found = {
        "step": step,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": cases[0].batch,
        "context": cases[-1].context,
        "layers": layers,
    }
    milliseconds = (f"{took * 1e3:.3f}" for took in medians.values())
    ratios = (f"{value:.2f}" for value in (ratio, roofline, ratio / roofline))
    print(row([*found.values(), *milliseconds, *ratios]), flush=True)
    return found | {
        "seconds_per_layer": medians,
        "spread": {name: [min(took), max(took)] for name, took in times.items()},
        "ratio": ratio,
        "roofline": roofline,
        "of_roofline": ratio / roofline,
    }


def cache_bytes(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Bytes of a token in one layer of both caches, which are in memory together."""
    return float((2 - args.sparsity) * args.kv_heads * 2 * args.head_dim * dtype.itemsize)


def main() -> None:
    shape = {"kv_heads": 8, "q_heads": 16, "head_dim": 128, "sink": 16, "window": 64}
    cases = {"contexts": [256, 1024, 4096, 8192, 16384, 32768], "batches": [1, 8, 64]}
    options = parser(__doc__, **shape, **cases, sparsity=0.5, dtypes="bfloat16,float32")
    options.add_argument("--block-size", type=int, default=32, help="of the split cache")
    options.add_argument("--prefill", type=int, default=8192, help="prompt length; 0: no prefill")
    options.add_argument("--chunk", type=int, default=2048, help="prompt tokens of a step")
    options.add_argument("--memory", type=float, default=3, help="GiB of cache")
    options.add_argument("--rounds", type=int, default=9, help="turns of each")
    options.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: one thread only")
    options.add_argument("--output", type=Path, help="write the figures as JSON")
    args = options.parse_args()
    torch.manual_seed(0)
    torch.cpu._init_amx()  # Linux lends a process the tile registers on request only
    where = conditions(args)
    columns = ("step", "type", "batch", "context", "layers")
    print(header(*columns, "stock ms", "split ms", "ratio", "bytes", "of it"))
    rows = []
    for name in args.dtypes.split(","):
        dtype = getattr(torch, name)
        for batch in args.batches:
            for context in args.contexts:
                if batch * context * cache_bytes(args, dtype) <= args.memory * 2**30:
                    rows.append(measure(args, "decode", [Requests(batch, context)], dtype))
        if args.prefill:
            ends = range(args.chunk, args.prefill + 1, args.chunk)
            chunks = [Requests(1, end, args.chunk) for end in ends]
            rows.append(measure(args, "prefill", chunks, dtype))
    write_json(args.output, where | {"rows": rows})


if __name__ == "__main__":
    main()
