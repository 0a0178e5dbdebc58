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
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import environment, header, in_turns, numbers, parser, row, write_json
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

from rlkv_vllm.allocation.forecast import CacheGeometry
from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.engine.cache.head_cache import HeadCacheLayer, HeadGroup, LayerHeads
from rlkv_vllm.engine.cpu.backend import SplitCPUImpl
from rlkv_vllm.engine.cpu.heads import SplitMetadata

#: CPU time of one thread, for machines with other work.
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

STOCK_BLOCK = 128  # vLLM's default on the CPU
MAX_LAYERS = 28

#: What an attention layer says of a cache that is not quantised.
UNSCALED = {"_k_scale_float": 1.0, "_v_scale_float": 1.0}

#: Runs all layers of a step on queries, keys and values.
Step = Callable[[list[torch.Tensor], torch.Tensor], None]


def parse_args() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--kv-heads", type=int, default=8)
    found.add_argument("--q-heads", type=int, default=16)
    found.add_argument("--head-dim", type=int, default=128)
    found.add_argument("--sparsity", type=float, default=0.5)
    found.add_argument("--sink", type=int, default=16)
    found.add_argument("--window", type=int, default=64)
    found.add_argument("--block-size", type=int, default=32, help="of the split cache")
    found.add_argument("--contexts", type=numbers, default=[256, 1024, 4096, 8192, 16384, 32768])
    found.add_argument("--batches", type=numbers, default=[1, 8, 64])
    found.add_argument("--prefill", type=int, default=8192, help="prompt length; 0: no prefill")
    found.add_argument("--chunk", type=int, default=2048, help="prompt tokens of a step")
    found.add_argument("--dtypes", default="bfloat16,float32")
    found.add_argument("--memory", type=float, default=3, help="GiB of cache")
    found.add_argument("--rounds", type=int, default=9, help="turns of each")
    found.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread only")
    found.add_argument("--output", type=Path, help="write the figures as JSON")
    return found.parse_args()


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

    def metadata(self, table: Table) -> dict[str, Any]:
        return {
            "num_actual_tokens": self.batch * self.new,
            "max_query_len": self.new,
            "query_start_loc": self.starts,
            "seq_lens": self.lengths,
            "block_table": table.table,
            "slot_mapping": table.slots,
        }

    def tokens_read(self, most: int) -> int:
        """Keys that a head which sees `most` tokens reads in the step."""
        positions = range(self.context - self.new + 1, self.context + 1)
        return self.batch * sum(min(i, most) for i in positions)


class Table:
    """Block tables of a case over blocks in random order, as in a pool that was used."""

    def __init__(self, case: Case, block_size: int, held: Callable[[int], bool]) -> None:
        width = num_blocks(case.context, block_size)
        blocks = [b for b in range(width) if held(b)]
        self.num_blocks = 1 + case.batch * len(blocks)
        self.table = torch.zeros(case.batch, width, dtype=torch.int32)
        ids = 1 + torch.randperm(self.num_blocks - 1).int()
        self.table[:, blocks] = ids.view(case.batch, len(blocks))
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
    """Random numbers, repeated: sampling all takes longer than the measurement."""
    cache = torch.empty(shape, dtype=dtype)
    pattern = torch.randn(1 << 20).to(dtype)
    for part in cache.view(-1).split(len(pattern)):
        part.copy_(pattern[: len(part)])
    return cache


def stock_step(args: argparse.Namespace, case: Case, dtype: torch.dtype, layers: int) -> Step:
    """One step of stock vLLM."""
    table = Table(case, STOCK_BLOCK, lambda _: True)
    isa = _get_attn_isa(dtype, STOCK_BLOCK, args.head_dim)
    shape = (table.num_blocks, args.kv_heads, STOCK_BLOCK, 2 * args.head_dim)
    caches = [filled(*shape, dtype=dtype) for _ in range(layers)]
    impl = empty_impl(args)
    layer: Any = SimpleNamespace(isa=isa, **UNSCALED)
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
            **case.metadata(table), max_seq_len=case.context, scheduler_metadata=schedule
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
) -> Step:
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

    layer: Any = SimpleNamespace(**UNSCALED)

    def run(qkv: list[torch.Tensor], output: torch.Tensor) -> None:
        step = {
            "full": SplitMetadata(**case.metadata(full_table)),
            "ring": SplitMetadata(**case.metadata(ring_table)),
        }
        context: Any = SimpleNamespace(attn_metadata=step)
        with override_forward_context(context):
            for impl in impls:
                impl.forward(layer, *qkv, torch.empty(0), step["full"], output)

    return run


def measure(
    args: argparse.Namespace, step: str, cases: list[Case], dtype: torch.dtype
) -> dict[str, Any]:
    """Median seconds per layer of the cases together, and the roofline."""
    rng = random.Random(0)
    d = args.head_dim
    largest = max(case.batch * case.context for case in cases)
    layer_bytes = largest * args.kv_heads * 2 * d * dtype.itemsize
    share = 2 - args.sparsity  # both caches are in memory
    layers = max(1, min(MAX_LAYERS, int(args.memory * 2**30 / (share * layer_bytes))))
    # Uneven layers, as profiles have them, with exactly the given sparsity.
    heads = [(layer, h) for layer in range(layers) for h in range(args.kv_heads)]
    full = rng.sample(heads, round(len(heads) * (1 - args.sparsity)))
    full_heads = [sorted(h for at, h in full if at == layer) for layer in range(layers)]
    steps: dict[str, list[Callable[[], None]]] = {"stock": [], "split": []}
    read_by_stock = read_by_split = 0.0
    for case in cases:
        qkv = [
            torch.randn(case.batch * case.new, n, d, dtype=dtype)
            for n in (args.q_heads, args.kv_heads, args.kv_heads)
        ]
        output = torch.empty_like(qkv[0])
        for name, run in (
            ("stock", stock_step(args, case, dtype, layers)),
            ("split", split_step(args, case, dtype, layers, full_heads)),
        ):
            steps[name].append(functools.partial(run, qkv, output))
        num_streaming = len(heads) - len(full)
        read_by_stock += len(heads) * case.tokens_read(case.context)
        read_by_split += len(full) * case.tokens_read(case.context)
        read_by_split += num_streaming * case.tokens_read(args.sink + args.window)
    clock = CLOCKS[args.clock]

    def seconds(name: str) -> float:
        total = 0.0
        for run in steps[name]:
            start = clock()
            run()
            total += clock() - start
        return total / layers

    medians, spread = in_turns(
        {name: functools.partial(seconds, name) for name in steps}, args.rounds
    )
    ratio, roofline = medians["stock"] / medians["split"], read_by_stock / read_by_split
    found = {
        "step": step,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": cases[0].batch,
        "context": cases[-1].context,
        "layers": layers,
    }
    milliseconds = (f"{medians[name] * 1e3:.3f}" for name in ("stock", "split"))
    ratios = (f"{value:.2f}" for value in (ratio, roofline, ratio / roofline))
    print(row([*found.values(), *milliseconds, *ratios]), flush=True)
    return found | {
        "seconds_per_layer": medians,
        "spread": spread,
        "ratio": ratio,
        "roofline": roofline,
        "of_roofline": ratio / roofline,
    }


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.cpu._init_amx()  # Linux lends a process the tile registers on request only
    where = environment()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    print(", ".join(f"{key} {value}" for key, value in (settings | where).items()))
    columns = ("step", "type", "batch", "context", "layers")
    print(header(*columns, "stock ms", "split ms", "ratio", "bytes", "of it"))
    rows = []
    for name in args.dtypes.split(","):
        dtype = getattr(torch, name)
        for batch in args.batches:
            for context in args.contexts:
                size = batch * context * args.kv_heads * 2 * args.head_dim * dtype.itemsize
                if size * (2 - args.sparsity) <= args.memory * 2**30:
                    rows.append(measure(args, "decode", [Case(batch, context)], dtype))
        if args.prefill:
            ends = range(args.chunk, args.prefill + 1, args.chunk)
            rows.append(measure(args, "prefill", [Case(1, end, args.chunk) for end in ends], dtype))
    if args.output:
        write_json(args.output, {"environment": where, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
