"""Time the GPU kernels against the bytes they must move and against dense kernels.

    python benchmarks/kernels.py                      # a CUDA GPU; about 5 minutes
    python benchmarks/kernels.py --quick              # few cases, about 1 minute
    python benchmarks/kernels.py --tune               # launch parameters against each other
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run   # no GPU: code runs, no times

Needs torch and triton only; vLLM's Triton attention and FlashAttention are timed too where they
are installed. One layer of 8 KV heads with 4 query heads each, head_dim 128, bfloat16, unless
told otherwise. Every case runs as a CUDA graph over as many layers as it takes to leave the L2
cache; times are medians. Every timed output is checked against the oracle.

Writes OUTPUT.json after every case, and OUTPUT.md at the end.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from common import environment, header, parser, row, write_json
from triton.runtime.errors import OutOfResources

from rlkv_vllm.kernels.reference import reference_attention
from rlkv_vllm.kernels.triton.decode import INTERPRETER, DecodeConfig
from rlkv_vllm.kernels.triton.prefill import PrefillConfig
from rlkv_vllm.kernels.triton.split_attention import (
    LayerCache,
    Workspace,
    split_attention,
    write_cache,
)

SINK, WINDOW = 16, 64
SPARSITIES = (0.0, 0.2, 0.5, 0.8)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-4}
#: Bytes of all layers of a case on a GPU: none is still in the L2 cache when its turn comes again.
LEAST_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def row_bytes(self) -> int:
        """Bytes of the key and the value of one token in one head."""
        return 2 * self.head_dim * self.dtype.itemsize


@dataclass
class Result:
    """One case; times in milliseconds per layer."""

    part: str
    kernel: str
    batch: int
    length: int
    sparsity: float
    new: int = 1
    layers: int = 1
    ms: float | None = None
    spread: float | None = None
    gbytes: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def gb_per_s(self) -> float | None:
        return self.gbytes / self.ms * 1e3 if self.ms and self.gbytes else None


class Layers:
    """Caches of several layers, filled with numbers; streaming heads hold a ring and no more.

    With ``gated`` all heads hold all tokens and have gates. ``target_programs`` and ``capability``
    are those of a device that is no GPU.
    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        length: int,
        sparsity: float,
        device: torch.device,
        *,
        new: int = 1,
        gated: bool = False,
        target_programs: int = 8,
        capability: int = INTERPRETER,
    ) -> None:
        self.shape, self.batch, self.length, self.new = shape, batch, length, new
        on_gpu = device.type == "cuda"
        bs, num_streaming = shape.block_size, round(sparsity * shape.num_kv_heads)
        num_full = shape.num_kv_heads - num_streaming
        self.streaming = [h >= num_full for h in range(shape.num_kv_heads)]
        blocks = triton.cdiv(length, bs)
        ring_blocks = min(blocks, triton.cdiv(SINK, bs) + triton.cdiv(WINDOW + new, bs) + 1)
        generator = torch.Generator().manual_seed(0)
        order = 1 + torch.randperm(batch * blocks, generator=generator)
        self.full_table = order.view(batch, blocks).int().to(device)
        # A ring's table is as long as a full one; only its sinks and its window have blocks.
        ring = torch.zeros(batch, blocks, dtype=torch.int32)
        ring_ids = 1 + torch.randperm(batch * ring_blocks, generator=generator).view(batch, -1)
        num_sink = min(triton.cdiv(SINK, bs), ring_blocks)
        ring[:, :num_sink] = ring_ids[:, :num_sink]
        if ring_blocks > num_sink:
            ring[:, num_sink - ring_blocks :] = ring_ids[:, num_sink:]
        self.ring_table = ring.to(device)
        self.kv_bytes = (
            batch
            * shape.row_bytes
            * (num_full * length + num_streaming * min(length, SINK + WINDOW))
        )
        stored = [1 + batch * (ring_blocks if kind else blocks) for kind in self.streaming]
        layer_bytes = sum(stored) * bs * shape.row_bytes
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else 4 << 30
        wanted = triton.cdiv(LEAST_BYTES if on_gpu else 0, max(self.kv_bytes, 1))
        self.num_layers = max(1, min(wanted, int(free * 0.8) // layer_bytes, 64))
        if layer_bytes * self.num_layers > free * 0.9:
            raise MemoryError(f"needs {layer_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
        self.caches = []
        self.full_pages = []  # [heads, blocks, block_size, 2 * head_dim], as vLLM's buffers lie
        for _ in range(self.num_layers):
            kinds = [
                torch.empty(
                    count, n, bs, 2 * shape.head_dim, dtype=shape.dtype, device=device
                ).normal_()
                for count, n in (
                    (num_full, 1 + batch * blocks),
                    (num_streaming, 1 + batch * ring_blocks),
                )
            ]
            self.full_pages.append(kinds[0])
            self.caches.append(
                LayerCache.of([*kinds[0], *kinds[1]], [gated or kind for kind in self.streaming])
            )
        n = batch * new
        num_q = shape.num_kv_heads * shape.group
        make = {"dtype": shape.dtype, "device": device}
        self.q = torch.randn(n, num_q, shape.head_dim, **make)
        self.k, self.v = (
            torch.randn(n, shape.num_kv_heads, shape.head_dim, **make) for _ in range(2)
        )
        self.out = torch.empty_like(self.q)
        self.starts = (torch.arange(batch + 1, dtype=torch.int32) * new).to(device)
        self.seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        positions = (length - new + torch.arange(new)).to(device)

        def slots(table: torch.Tensor) -> torch.Tensor:
            return (table[:, positions // bs].long() * bs + positions % bs).flatten()

        if gated:
            self.ring_table = self.full_table
        self.gates = torch.linspace(0.1, 0.9, shape.num_kv_heads).to(device) if gated else None
        self.full_slots, self.ring_slots = slots(self.full_table), slots(self.ring_table)
        self.workspace = Workspace.of(
            max_requests=batch,
            num_q_heads=num_q,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            device=device,
            gated=gated,
            target_programs=None if on_gpu else target_programs,
            capability=None if on_gpu else capability,
        )

    def write(self) -> None:
        for cache in self.caches:
            write_cache(self.k, self.v, cache, self.full_slots, self.ring_slots)

    def attend(
        self, decode: DecodeConfig | None = None, prefill: PrefillConfig | None = None
    ) -> None:
        for cache in self.caches:
            split_attention(
                self.q,
                self.k,
                self.v,
                self.out,
                cache,
                full_table_RB=self.full_table,
                ring_table_RB=self.ring_table,
                query_start_loc=self.starts,
                seq_lens=self.seq_lens,
                max_query_len=self.new,
                workspace=self.workspace,
                sink=SINK,
                window=WINDOW,
                scale=self.shape.head_dim**-0.5,
                gates_H=self.gates,
                decode_with=decode,
                prefill_with=prefill,
            )

    def error(self) -> float:
        """Relative error of the last layer's output against the oracle, worst of two requests."""
        cache, bs = self.caches[-1], self.shape.block_size
        position = torch.arange(self.length, device=self.q.device)
        last = min(self.new, 256)  # they see most; the oracle holds all scores at once
        spans = {"sink": SINK, "window": WINDOW, "scale": self.shape.head_dim**-0.5}
        full_heads = [h for h, kind in enumerate(self.streaming) if not kind]
        worst = 0.0
        for r in {0, self.batch - 1}:
            tables = [self.ring_table[r] if kind else self.full_table[r] for kind in self.streaming]
            heads = [
                pages[table[position // bs].long(), position % bs]
                for pages, table in zip(cache.caches, tables, strict=True)
            ]
            k, v = torch.stack(heads, dim=1).float().split(self.shape.head_dim, dim=-1)
            rows = slice(r * self.new, (r + 1) * self.new)
            if self.new > 1:  # what lean prefill does not keep comes from the step's inputs
                k = torch.cat([k[: self.length - self.new], self.k[rows].float()])
                v = torch.cat([v[: self.length - self.new], self.v[rows].float()])
            q = self.q[rows][-last:].float()
            expected = reference_attention(q, k, v, full_heads=full_heads, **spans)
            if self.gates is not None:
                gates = self.gates.repeat_interleave(self.shape.group)[:, None]
                local = reference_attention(q, k, v, full_heads=[], **spans)
                expected = gates * expected + (1 - gates) * local
            found = self.out[rows][-last:].float()
            worst = max(worst, float((found - expected).norm() / expected.norm()))
        return worst


def dense_kernels(layers: Layers) -> dict[str, Callable[[], None]]:
    """Dense attention of others over the same number of tokens, where installed."""
    found: dict[str, Callable[[], None]] = {}
    shape, device = layers.shape, layers.q.device
    if device.type != "cuda":
        return found
    size = (shape.block_size, shape.num_kv_heads, shape.head_dim)
    make = {"dtype": shape.dtype, "device": device}
    pages = [
        torch.empty(2, 1 + layers.full_table.numel(), *size, **make).normal_()
        for _ in range(layers.num_layers)
    ]
    out, scale = torch.empty_like(layers.q), shape.head_dim**-0.5
    shared = {
        "cu_seqlens_q": layers.starts,
        "max_seqlen_q": layers.new,
        "seqused_k": layers.seq_lens,
        "max_seqlen_k": layers.length,
        "softmax_scale": scale,
        "causal": True,
        "block_table": layers.full_table,
        "out": out,
    }
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        pass
    else:
        rows = (max(layers.batch, 1), shape.num_kv_heads * shape.group, 16)
        make = {"dtype": torch.float32, "device": device}
        segments = {
            "seq_threshold_3D": 128 // shape.num_kv_heads,
            "num_par_softmax_segments": rows[-1],
            "softmax_segm_output": torch.empty(
                *rows, triton.next_power_of_2(shape.head_dim), **make
            ),
            "softmax_segm_max": torch.empty(rows, **make),
            "softmax_segm_expsum": torch.empty(rows, **make),
        }
        nothing = {"softcap": 0, "q_descale": None, "k_descale": None, "v_descale": None}

        def unified() -> None:
            for k, v in pages:
                unified_attention(
                    q=layers.q, k=k, v=v, window_size=(-1, -1), **shared, **segments, **nothing
                )

        found["vLLM Triton unified"] = unified
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported
    except ImportError:
        pass
    else:
        version = 3 if is_fa_version_supported(3) else 2

        def flash(caches: Any) -> None:
            for k, v in caches:
                flash_attn_varlen_func(layers.q, k, v, fa_version=version, **shared)

        found["FlashAttention"] = partial(flash, pages)
        # The same on our pages: what full heads could use instead of our kernel.
        strided = [full.permute(1, 2, 0, 3).split(shape.head_dim, -1) for full in layers.full_pages]
        found["FlashAttention, our pages"] = partial(flash, strided)
    if layers.new == layers.length and layers.batch == 1:
        q, k, v = (t.transpose(0, 1)[None] for t in (layers.q, layers.k, layers.v))

        def sdpa() -> None:
            for _ in range(layers.num_layers):
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=True
                )

        found["torch SDPA"] = sdpa
    return found


class Bench:
    """Runs cases until the time is up; what was measured is on disk after each."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.shape = Shape(
            args.kv_heads, args.group, args.head_dim, args.block_size, getattr(torch, args.dtype)
        )
        self.deadline = time.monotonic() + args.time_limit
        self.results: list[Result] = []
        self.environment = environment()
        self.copy_gb_per_s = 0.0

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def time(self, result: Result, run: Callable[[], None]) -> None:
        """Time as a CUDA graph, per layer; without a GPU run once."""
        if self.device.type != "cuda":
            run()
            return
        times = triton.testing.do_bench_cudagraph(run, return_mode="all")
        result.ms = statistics.median(times) / result.layers
        result.spread = (max(times) - min(times)) / statistics.median(times)

    def add(self, result: Result) -> None:
        self.results.append(result)
        figures = {
            "environment": self.environment,
            "shape": asdict(self.shape),
            "sink": SINK,
            "window": WINDOW,
            "copy_gb_per_s": self.copy_gb_per_s,
            "results": [{**asdict(r), "gb_per_s": r.gb_per_s} for r in self.results],
        }
        write_json(self.args.output.with_suffix(".json"), figures)
        print(row(self.cells(result)), flush=True)

    def copy(self) -> None:
        """Device copy bandwidth: read plus written bytes per second."""
        size = (1 << 30) if self.device.type == "cuda" else (1 << 16)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        result = Result("copy", "torch copy_", 1, size, 0.0, gbytes=2 * size / 1e9)
        self.time(result, lambda: target.copy_(source))
        self.copy_gb_per_s = result.gb_per_s or 0.0
        self.add(result)

    def case(
        self,
        part: str,
        batch: int,
        length: int,
        sparsity: float,
        *,
        new: int = 1,
        gated: bool = False,
        dense: bool = False,
        config: DecodeConfig | PrefillConfig | None = None,
    ) -> None:
        """Time one case and, if asked, dense kernels."""
        if self.is_over:
            return
        if self.device.type == "cuda":  # what the last case held counts as used until then
            gc.collect()
            torch.cuda.empty_cache()
        name = "cache write" if part == "write" else "gated" if gated else "split"
        if config is not None:
            name = ",".join(str(value) for value in asdict(config).values())
        result = Result(part, name, batch, length, sparsity, new)
        try:
            layers = Layers(self.shape, batch, length, sparsity, self.device, new=new, gated=gated)
            result.layers = layers.num_layers
            moved = 2 * 2 * layers.k.nbytes if part == "write" else layers.kv_bytes
            if part == "write":
                run = layers.write
            else:
                moved += 2 * layers.q.nbytes
                layers.write()
                key = "decode" if isinstance(config, DecodeConfig) else "prefill"
                run = partial(layers.attend, **({key: config} if config else {}))
            result.gbytes = moved / 1e9 if part != "prefill" else None
            self.time(result, run)
            if part != "write":
                self.check(result, layers)
            self.add(result)
            if dense:
                self.time_dense(result, layers)
        except (MemoryError, torch.cuda.OutOfMemoryError, OutOfResources) as error:
            if result not in self.results:
                result.note = f"skipped: {error}".split("\n")[0]
                self.add(result)

    def check(self, result: Result, layers: Layers) -> None:
        """Compare the output with the oracle, which holds all scores of a request at once."""
        try:
            result.error = layers.error()
        except torch.cuda.OutOfMemoryError:
            result.note = "not checked: no memory for the oracle"
            return
        if not result.error < TOLERANCE[self.shape.dtype]:
            result.note = "WRONG"

    def time_dense(self, ours: Result, layers: Layers) -> None:
        """Dense kernels on the same shapes; one that does not run is left out."""
        for name, run in dense_kernels(layers).items():
            result = Result(ours.part, name, ours.batch, ours.length, ours.sparsity, ours.new)
            result.layers, result.gbytes = ours.layers, ours.gbytes
            try:
                self.time(result, run)
            except (RuntimeError, AttributeError, TypeError) as error:
                print(f"{name} does not run: {error}".split("\n")[0], file=sys.stderr)
            else:
                self.add(result)

    def cells(self, result: Result) -> list[object]:
        """Row of the table."""
        speed = result.gb_per_s
        return [
            result.part,
            result.kernel,
            result.batch,
            result.length,
            f"{result.sparsity:g}",
            f"{result.ms:.4f}" if result.ms else None,
            f"{speed:,.0f}" if speed else None,
            f"{speed / self.copy_gb_per_s:.2f}" if speed and self.copy_gb_per_s else None,
            result.note or (None if result.error is None else f"{result.error:.1e}"),
        ]


COLUMNS = ("part", "kernel", "batch", "length", "s", "ms", "GB/s", "of copy", "error")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--output", type=Path, default=Path("runs/kernels/kernels"))
    found.add_argument("--quick", action="store_true", help="few cases")
    found.add_argument("--tune", action="store_true", help="launch parameters, not the cases")
    found.add_argument("--dry-run", action="store_true", help="tiny cases, no GPU, no times")
    found.add_argument("--time-limit", type=float, default=480, help="seconds; then it stops")
    found.add_argument("--kv-heads", type=int, default=8)
    found.add_argument("--group", type=int, default=4, help="query heads per KV head")
    found.add_argument("--head-dim", type=int, default=128)
    found.add_argument("--block-size", type=int, default=16)
    found.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return found.parse_args(arguments)


def run_tuning(bench: Bench, batches: Sequence[int], lengths: Sequence[int]) -> None:
    new = min(4096, max(lengths))
    for values in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        bench.case("prefill", 1, new, 0.5, new=new, config=PrefillConfig(*values))
    for batch, length in itertools.product(batches, lengths):
        for values in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 5)):
            bench.case("decode", batch, length, 0.5, config=DecodeConfig(*values))


def run_cases(bench: Bench, quick: bool, dry: bool) -> None:
    """Decode first, the longest cases last."""
    batches: Sequence[int] = (1, 8, 64, 256)
    lengths: Sequence[int] = (1024, 4096, 8192, 16384, 32768, 65536)
    prompts: Sequence[int] = (1024, 4096, 16384, 32768)
    if quick:
        batches, lengths, prompts = (1, 64), (1024, 8192, 32768), (8192,)
    if dry:
        batches, lengths, prompts = (2,), (96,), (96,)
    for length, batch in sorted(itertools.product(lengths, batches), key=lambda c: c[0] * c[1]):
        for sparsity in SPARSITIES:
            bench.case("decode", batch, length, sparsity, dense=sparsity == 0)
        bench.case("decode", batch, length, 0.0, gated=True)
    for length in prompts:
        for sparsity in SPARSITIES:
            bench.case("prefill", 1, length, sparsity, new=length, dense=sparsity == 0)
        bench.case("prefill", 1, length, 0.0, new=length, gated=True)
    for length in prompts[-1:]:
        for sparsity in (0.0, 0.5):
            bench.case("prefill", 1, length, sparsity, new=max(2, length // 4), dense=sparsity == 0)
    for batch in batches:
        bench.case("write", batch, lengths[0], 0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.dry_run:
        if not triton.knobs.runtime.interpret:
            print("error: --dry-run needs TRITON_INTERPRET=1 in the environment", file=sys.stderr)
            return 2
        args.dtype = "float32"
    elif not torch.cuda.is_available():
        print(
            "error: no CUDA GPU: run it on one, or TRITON_INTERPRET=1 python "
            "benchmarks/kernels.py --dry-run",
            file=sys.stderr,
        )
        return 2
    bench = Bench(args, device)
    print(header(*COLUMNS))
    bench.copy()
    if args.tune:
        batches, lengths = ((2,), (96,)) if args.dry_run else ((1, 64), (4096, 8192))
        run_tuning(bench, batches, lengths)
    else:
        run_cases(bench, args.quick, args.dry_run)
    where = ", ".join(f"{key} {value}" for key, value in bench.environment.items())
    head = [f"{where}. Device copy {bench.copy_gb_per_s:,.0f} GB/s.", "", header(*COLUMNS)]
    rows = [row(bench.cells(result)) for result in bench.results]
    args.output.with_suffix(".md").write_text("\n".join([*head, *rows, ""]))
    if bench.is_over:
        print("time limit reached: not all cases were run", file=sys.stderr)
    wrong = [result for result in bench.results if result.note == "WRONG"]
    if wrong:
        print(f"error: {len(wrong)} cases differ from the oracle", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
