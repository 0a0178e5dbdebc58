"""Attention of one layer on the CPU: split cache against stock vLLM, in one process, no model.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/attention_layer.py

Each is the attention implementation that the engine runs, with what it needs once per step, on
random keys in a cache of as many layers as fit in --memory (28 at the most, so that small caches
do not stay in the processor's). They take turns. Beside each ratio stands the roofline: bytes of
keys and values that stock reads over those that the split reads.

Prints a table of medians per layer, writes JSON with --output.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

from rlkv_vllm.allocation.forecast import CacheGeometry
from rlkv_vllm.engine.cache.head_cache import HeadCacheLayer, HeadGroup, LayerHeads
from rlkv_vllm.engine.cpu.backend import SplitCPUImpl
from rlkv_vllm.engine.cpu.heads import SplitMetadata

#: On a machine with other work, CPU time of one thread tells what wall time of an idle one would.
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

STOCK_BLOCK = 128  # vLLM's default on the CPU
MAX_LAYERS = 28


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--q-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--sink", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32, help="of the split cache")
    parser.add_argument("--contexts", default="256,1024,4096,8192,16384,32768")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prefill", type=int, default=8192, help="prompt length; 0: no prefill")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens of a step")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--memory", type=float, default=3, help="GiB of cache")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread only")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


@dataclass
class Case:
    """Requests of one step: each has ``context`` tokens, the last ``new`` of them new."""

    batch: int
    context: int
    new: int = 1

    @property
    def lengths(self) -> torch.Tensor:
        return torch.full((self.batch,), self.context, dtype=torch.int32)

    @property
    def starts(self) -> torch.Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32) * self.new

    def blocks(self, block_size: int) -> int:
        return -(-self.context // block_size)


class Table:
    """Block tables of a case over blocks handed out at random, as in a pool that was used."""

    def __init__(self, case: Case, block_size: int, held: Callable[[int], bool]) -> None:
        blocks = [b for b in range(case.blocks(block_size)) if held(b)]
        self.num_blocks = 1 + case.batch * len(blocks)
        ids = iter((1 + torch.randperm(self.num_blocks - 1)).tolist())
        self.table = torch.zeros(case.batch, case.blocks(block_size), dtype=torch.int32)
        for row in self.table:
            for b in blocks:
                row[b] = next(ids)
        position = torch.arange(case.context - case.new, case.context)
        block = self.table[:, position // block_size].long()
        self.slots = (block * block_size + position % block_size).flatten()


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
    """Random numbers, repeated: drawing them all takes longer than the measurement."""
    cache = torch.empty(shape, dtype=dtype)
    pattern = torch.randn(1 << 20).to(dtype)
    for part in cache.view(-1).split(len(pattern)):
        part.copy_(pattern[: len(part)])
    return cache


def stock_step(
    args: argparse.Namespace, case: Case, dtype: torch.dtype, layers: int
) -> Callable[[list[torch.Tensor], torch.Tensor], None]:
    """One step of stock vLLM."""
    table = Table(case, STOCK_BLOCK, lambda _: True)
    isa = _get_attn_isa(dtype, STOCK_BLOCK, args.head_dim)
    shape = (table.num_blocks, args.kv_heads, STOCK_BLOCK, 2 * args.head_dim)
    caches = [filled(*shape, dtype=dtype) for _ in range(layers)]
    impl = empty_impl(args)
    layer: Any = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    attend = super(SplitCPUImpl, impl).forward

    def run(qkv: list[torch.Tensor], output: torch.Tensor) -> None:

        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=args.q_heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            seq_lens=case.lengths,
            dtype=dtype,
            query_start_loc=case.starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        metadata = CPUAttentionMetadata(
            num_actual_tokens=case.batch * case.new,
            max_query_len=case.new,
            query_start_loc=case.starts,
            max_seq_len=case.context,
            seq_lens=case.lengths,
            block_table=table.table,
            slot_mapping=table.slots,
            scheduler_metadata=schedule,
        )
        for cache in caches:
            impl.do_kv_cache_update(layer, qkv[1], qkv[2], cache, table.slots)
            attend(layer, *qkv, cache, metadata, output)

    return run


def split_step(
    args: argparse.Namespace,
    case: Case,
    dtype: torch.dtype,
    layers: int,
    full_heads: list[list[int]],
) -> Callable[[list[torch.Tensor], torch.Tensor], None]:
    """One step of the split cache."""
    size = args.block_size
    before = case.context - case.new  # tokens before the step

    def in_ring(b: int) -> bool:
        window_from = before if b * size < before else case.context
        return b * size < args.sink or (b + 1) * size > window_from - args.window + 1

    full_table, ring_table = Table(case, size, lambda _: True), Table(case, size, in_ring)
    geometry = CacheGeometry(
        layers, args.kv_heads, args.head_dim, dtype.itemsize, size, args.sink, args.window
    )

    def group(name: str, heads: list[int], num_blocks: int) -> HeadGroup | None:
        if not heads:
            return None
        caches = filled(len(heads), num_blocks, 1, size, 2 * args.head_dim, dtype=dtype)
        made: list[HeadCacheLayer] = []
        for cache in caches:
            made.append(HeadCacheLayer(None, args.q_heads, None))  # type: ignore[arg-type]
            made[-1].kv_cache = cache
        return HeadGroup(tuple(heads), (name,) * len(heads), tuple(made))

    impls = []
    for layer in range(layers):
        full = full_heads[layer]
        ring = [h for h in range(args.kv_heads) if h not in full]
        impl = empty_impl(args)
        impl.plan = SimpleNamespace(geometry=geometry)  # type: ignore[assignment]
        streaming = group("ring", ring, ring_table.num_blocks)
        impl.heads = LayerHeads(
            group("full", full, full_table.num_blocks), (streaming,) if streaming else ()
        )
        impl.prepare(dtype)
        impls.append(impl)

    def metadata(table: Table) -> SplitMetadata:
        return SplitMetadata(
            num_actual_tokens=case.batch * case.new,
            max_query_len=case.new,
            query_start_loc=case.starts,
            seq_lens=case.lengths,
            block_table=table.table,
            slot_mapping=table.slots,
        )

    nothing: Any = torch.empty(0)

    def run(qkv: list[torch.Tensor], output: torch.Tensor) -> None:
        step = {"full": metadata(full_table), "ring": metadata(ring_table)}
        context: Any = SimpleNamespace(attn_metadata=step)
        with override_forward_context(context):
            for impl in impls:
                impl.forward(nothing, *qkv, nothing, step["full"], output)  # type: ignore[arg-type]

    return run


def measure(args: argparse.Namespace, cases: list[Case], dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds per layer of the cases together, and the roofline."""
    rng = random.Random(0)
    d, rows = args.head_dim, max(case.batch * case.new for case in cases)
    largest = max(cases, key=lambda case: case.batch * case.context)
    layer_bytes = largest.batch * largest.context * args.kv_heads * 2 * d * dtype.itemsize
    share = 2 - args.sparsity  # both caches stand side by side
    layers = max(1, min(MAX_LAYERS, int(args.memory * 2**30 / (share * layer_bytes))))
    # Uneven layers, as profiles have them, but the sparsity asked for.
    heads = [(layer, h) for layer in range(layers) for h in range(args.kv_heads)]
    full = rng.sample(heads, round(len(heads) * (1 - args.sparsity)))
    full_heads = [sorted(h for at, h in full if at == layer) for layer in range(layers)]
    seconds: dict[str, list[float]] = {"stock": [], "split": []}
    read = {"stock": 0.0, "split": 0.0}
    runs = []
    for case in cases:
        qkv = [
            torch.randn(case.batch * case.new, n, d, dtype=dtype)
            for n in (args.q_heads, args.kv_heads, args.kv_heads)
        ]
        runs.append(
            (
                case,
                qkv,
                {
                    "stock": stock_step(args, case, dtype, layers),
                    "split": split_step(args, case, dtype, layers, full_heads),
                },
            )
        )
        for i in range(case.context - case.new + 1, case.context + 1):
            read["stock"] += case.batch * i
            streaming = min(i, args.sink + args.window)
            read["split"] += (
                case.batch * (i * len(full) + streaming * (len(heads) - len(full))) / len(heads)
            )
    clock = CLOCKS[args.clock]
    output = torch.empty(rows, args.q_heads, d, dtype=dtype)
    for turn in range(args.rounds + 1):
        for name in seconds:
            total = 0.0
            for case, qkv, step in runs:
                start = clock()
                step[name](qkv, output[: case.batch * case.new])
                total += clock() - start
            if turn:  # the first warms up
                seconds[name].append(total / layers)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio, roofline = medians["stock"] / medians["split"], read["stock"] / read["split"]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": cases[0].batch,
        "context": cases[-1].context,
        "layers": layers,
        "seconds_per_layer": medians,
        "spread": {n: [min(t), max(t)] for n, t in seconds.items()},
        "ratio": ratio,
        "roofline": roofline,
        "of_roofline": ratio / roofline,
    }


def line(kind: str, row: dict[str, Any]) -> str:
    times = row["seconds_per_layer"]
    return (
        f"| {kind} | {row['dtype']} | {row['batch']} | {row['context']} | {row['layers']} | "
        f"{times['stock'] * 1e3:.3f} | {times['split'] * 1e3:.3f} | {row['ratio']:.2f} | "
        f"{row['roofline']:.2f} | {row['of_roofline']:.2f} |"
    )


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    print(
        f"{args.kv_heads} KV heads x {args.head_dim}, {args.q_heads} query heads, sparsity "
        f"{args.sparsity}, sink {args.sink}, window {args.window}, blocks {STOCK_BLOCK} and "
        f"{args.block_size}, {torch.get_num_threads()} threads, {args.clock} time, {date.today()}, "
        f"vLLM {vllm.__version__}, torch {torch.__version__}, CPU"
    )
    print(
        "| step | type | batch | context | layers | stock ms | split ms | ratio | bytes | of it |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in args.dtypes.split(","):
        dtype = getattr(torch, name)
        for batch in map(int, args.batches.split(",")):
            for context in map(int, filter(None, args.contexts.split(","))):
                size = batch * context * args.kv_heads * 2 * args.head_dim * dtype.itemsize
                if size * (2 - args.sparsity) > args.memory * 2**30:
                    continue
                rows.append({"step": "decode", **measure(args, [Case(batch, context)], dtype)})
                print(line("decode", rows[-1]), flush=True)
        if args.prefill:
            ends = range(args.chunk, args.prefill + 1, args.chunk)
            cases = [Case(1, end, args.chunk) for end in ends]
            rows.append({"step": "prefill", **measure(args, cases, dtype)})
            print(line("prefill", rows[-1]), flush=True)
    if args.output:
        figures = {
            "date": str(date.today()),
            "settings": {k: v for k, v in vars(args).items() if k != "output"},
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "rows": rows,
        }
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
