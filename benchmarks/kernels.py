"""Time the GPU kernels against the bytes they must move and against dense kernels.

    python benchmarks/kernels.py                      # a CUDA GPU; about 5 minutes
    python benchmarks/kernels.py --quick              # the cases of the README, about 1 minute
    python benchmarks/kernels.py --tune               # launch parameters against each other
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run   # no GPU: code runs, no times

Needs torch and triton only; vLLM's Triton attention and FlashAttention are timed beside ours where
they are installed. One layer of 8 KV heads with 4 query heads each, head_dim 128, bfloat16, unless
told otherwise. Every case runs as a CUDA graph over as many layers as it takes to leave the L2
cache; times are medians over interleaved rounds. Every timed output is checked against the oracle.

Writes OUTPUT.json after every case, and OUTPUT.md and OUTPUT.png at the end.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

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

    def num_full(self, sparsity: float) -> int:
        return self.num_kv_heads - round(sparsity * self.num_kv_heads)


@dataclass
class Result:
    """One case; times in milliseconds per layer."""

    part: str
    kernel: str
    batch: int
    length: int
    sparsity: float
    ms: float | None = None
    spread: float | None = None
    gbytes: float | None = None
    error: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float | None:
        return self.gbytes / self.ms * 1e3 if self.ms and self.gbytes else None


class Timer:
    """Runs callables as CUDA graphs, interleaved; without a GPU runs each once."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def __call__(self, runs: dict[str, tuple[Callable[[], None], int]]) -> dict[str, list[float]]:
        """Milliseconds per layer and round of each callable, which runs so many layers."""
        if self.device.type != "cuda":
            for run, _ in runs.values():
                run()
            return {name: [] for name in runs}
        graphs = {}
        for name, (run, _) in runs.items():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs[name] = graph
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(self.rounds + 1):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The GPU waits while the host launches the graph, so that this is not timed.
                torch.cuda._sleep(1_000_000)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if i:  # the first round warms up
                    times[name].append(start.elapsed_time(end) / runs[name][1])
        return times


class Layers:
    """Caches of several layers, filled with numbers; streaming heads hold a ring and no more.

    With ``gated`` all heads hold all tokens and have gates.
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
        least_bytes: int = 0,
    ) -> None:
        self.shape, self.batch, self.length, self.new = shape, batch, length, new
        bs, num_full = shape.block_size, shape.num_full(sparsity)
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
            * (num_full * length + (shape.num_kv_heads - num_full) * min(length, SINK + WINDOW))
        )
        stored = [1 + batch * (ring_blocks if kind else blocks) for kind in self.streaming]
        layer_bytes = sum(stored) * bs * shape.row_bytes
        self.num_layers = max(1, triton.cdiv(least_bytes, max(self.kv_bytes, 1)))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
        self.num_layers = min(self.num_layers, max(1, int(free * 0.8) // layer_bytes), 64)
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
                    (shape.num_kv_heads - num_full, 1 + batch * ring_blocks),
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
        on_gpu = device.type == "cuda"
        self.workspace = Workspace.of(
            max_requests=batch,
            num_q_heads=num_q,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            device=device,
            gated=gated,
            target_programs=None if on_gpu else 8,
            capability=None if on_gpu else INTERPRETER,
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
        worst = 0.0
        for r in {0, self.batch - 1}:
            heads = []
            for h, pages in enumerate(cache.caches):
                table = self.ring_table if self.streaming[h] else self.full_table
                heads.append(pages[table[r, position // bs].long(), position % bs])
            kv = torch.stack(heads, dim=1).float()
            rows = slice(r * self.new, (r + 1) * self.new)
            k, v = kv.split(self.shape.head_dim, dim=-1)
            if self.new > 1:  # what lean prefill does not keep comes from the step's inputs
                k = torch.cat([k[: self.length - self.new], self.k[rows].float()])
                v = torch.cat([v[: self.length - self.new], self.v[rows].float()])
            # Long prompts: the last queries see most; the oracle holds all scores at once.
            last = min(self.new, 256)
            attend = partial(
                reference_attention,
                self.q[rows][-last:].float(),
                k,
                v,
                sink=SINK,
                window=WINDOW,
                scale=self.shape.head_dim**-0.5,
            )
            expected = attend(full_heads=[h for h, kind in enumerate(self.streaming) if not kind])
            if self.gates is not None:
                gates = self.gates.repeat_interleave(self.shape.group)[:, None]
                expected = gates * expected + (1 - gates) * attend(full_heads=[])
            found = self.out[rows][-last:].float()
            worst = max(worst, float((found - expected).norm() / expected.norm()))
        return worst


def dense_kernels(layers: Layers) -> dict[str, Callable[[], None]]:
    """Dense attention of others over the same number of tokens, where installed."""
    found: dict[str, Callable[[], None]] = {}
    shape, device = layers.shape, layers.q.device
    if device.type != "cuda":
        return found
    blocks = 1 + layers.full_table.numel()
    pages = [
        torch.empty(
            2,
            blocks,
            shape.block_size,
            shape.num_kv_heads,
            shape.head_dim,
            dtype=shape.dtype,
            device=device,
        ).normal_()
        for _ in range(layers.num_layers)
    ]
    out = torch.empty_like(layers.q)
    scale = shape.head_dim**-0.5
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        pass
    else:
        segments = 16
        num_q = shape.num_kv_heads * shape.group
        rows = max(layers.batch, 1)
        make = {"dtype": torch.float32, "device": device}
        segm_out = torch.empty(
            rows, num_q, segments, triton.next_power_of_2(shape.head_dim), **make
        )
        segm_max, segm_sum = (torch.empty(rows, num_q, segments, **make) for _ in range(2))

        def unified() -> None:
            for k, v in pages:
                unified_attention(
                    q=layers.q,
                    k=k,
                    v=v,
                    out=out,
                    cu_seqlens_q=layers.starts,
                    max_seqlen_q=layers.new,
                    seqused_k=layers.seq_lens,
                    max_seqlen_k=layers.length,
                    softmax_scale=scale,
                    causal=True,
                    window_size=(-1, -1),
                    block_table=layers.full_table,
                    softcap=0,
                    q_descale=None,
                    k_descale=None,
                    v_descale=None,
                    seq_threshold_3D=128 // shape.num_kv_heads,
                    num_par_softmax_segments=segments,
                    softmax_segm_output=segm_out,
                    softmax_segm_max=segm_max,
                    softmax_segm_expsum=segm_sum,
                )

        found["vLLM Triton unified"] = unified
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported
    except ImportError:
        pass
    else:

        def flash(caches: Any) -> None:
            for k, v in caches:
                flash_attn_varlen_func(
                    layers.q,
                    k,
                    v,
                    max_seqlen_q=layers.new,
                    cu_seqlens_q=layers.starts,
                    max_seqlen_k=layers.length,
                    seqused_k=layers.seq_lens,
                    softmax_scale=scale,
                    causal=True,
                    block_table=layers.full_table,
                    out=out,
                    fa_version=3 if is_fa_version_supported(3) else 2,
                )

        found["FlashAttention"] = partial(flash, pages)
        # The same on our pages: what full heads could use instead of our kernel.
        strided = [
            (
                full.permute(1, 2, 0, 3)[..., : shape.head_dim],
                full.permute(1, 2, 0, 3)[..., shape.head_dim :],
            )
            for full in layers.full_pages
        ]
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
    """Runs cases until the time is up and keeps what was measured on disk."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.shape = Shape(
            args.kv_heads,
            args.group,
            args.head_dim,
            args.block_size,
            getattr(torch, args.dtype),
        )
        self.timer = Timer(device, args.rounds)
        self.deadline = time.monotonic() + args.time_limit
        self.results: list[Result] = []
        self.environment = environment(device)
        self.copy_gb_per_s = 0.0

    @property
    def _least_bytes(self) -> int:
        """Enough layers that none is still in the L2 cache when its turn comes again."""
        return 256 << 20 if self.device.type == "cuda" else 0

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.save()
        speed = f"{result.gb_per_s:,.0f} GB/s" if result.gb_per_s else result.note
        ms = f"{result.ms:.4f} ms" if result.ms else "-"
        print(
            f"{result.part:8} {result.kernel:20} batch {result.batch:4} length {result.length:6} "
            f"s {result.sparsity:.1f}  {ms}  {speed}"
            + (f"  error {result.error:.1e}" if result.error is not None else ""),
            flush=True,
        )

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def copy(self) -> None:
        """Device copy bandwidth: read plus written bytes per second."""
        size = (1 << 30) if self.device.type == "cuda" else (1 << 16)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        times = self.timer({"copy": (copy, 1)})["copy"]
        result = Result("copy", "torch copy_", 1, size, 0.0, gbytes=2 * size / 1e9)
        _fill(result, times)
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
        """Time one case: ours and, if asked, dense kernels beside it."""
        if self.over():
            return
        if self.device.type == "cuda":  # what the last case held counts as used until then
            gc.collect()
            torch.cuda.empty_cache()
        name = "cache write" if part == "write" else "gated" if gated else "split"
        if config is not None:
            name = ",".join(str(value) for value in asdict(config).values())
        result = Result(part, name, batch, length, sparsity)
        try:
            layers = Layers(
                self.shape,
                batch,
                length,
                sparsity,
                self.device,
                new=new,
                gated=gated,
                least_bytes=self._least_bytes,
            )
            if part == "write":
                run = layers.write
            else:
                layers.write()
                key = "decode" if isinstance(config, DecodeConfig) else "prefill"
                run = partial(layers.attend, **({key: config} if config else {}))
            times = self.timer({name: (run, layers.num_layers)})
            if part != "write":
                self._check(result, layers)
            if dense:
                times |= self._time_dense(layers, run)
            q_bytes = 2 * layers.q.numel() * layers.q.element_size()
            new_bytes = 2 * 2 * layers.k.numel() * layers.k.element_size()
            for kernel, measured in times.items():
                row = result if kernel == name else Result(part, kernel, batch, length, sparsity)
                moved = new_bytes if part == "write" else layers.kv_bytes + q_bytes
                if part != "prefill":
                    row.gbytes = moved / 1e9
                _fill(row, measured)
                row.extra = {"new": new, "layers": layers.num_layers}
                self.add(row)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            result.note = f"skipped: {error}".split("\n")[0]
            self.add(result)
        except triton.runtime.errors.OutOfResources as error:
            result.note = f"does not fit: {error}"
            self.add(result)

    def _check(self, result: Result, layers: Layers) -> None:
        """Compare the output with the oracle, which holds all scores of a request at once."""
        try:
            result.error = layers.error()
        except torch.cuda.OutOfMemoryError:
            result.note = "not checked: no memory for the oracle"
            return
        if not result.error < TOLERANCE[self.shape.dtype]:
            result.note = "WRONG"

    def _time_dense(self, layers: Layers, ours: Callable[[], None]) -> dict[str, list[float]]:
        """Dense kernels, each interleaved with ours; one that does not run is left out."""
        times: dict[str, list[float]] = {}
        try:
            kernels = dense_kernels(layers)
        except torch.cuda.OutOfMemoryError as error:
            print(f"no dense kernels beside it: {error}".split("\n")[0], file=sys.stderr)
            return times
        for name, run in kernels.items():
            try:
                both = {"ours": (ours, layers.num_layers), name: (run, layers.num_layers)}
                times[name] = self.timer(both)[name]
            except (RuntimeError, AttributeError, TypeError) as error:
                print(f"{name} does not run: {error}".split("\n")[0], file=sys.stderr)
        return times

    def save(self) -> None:
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "environment": self.environment,
            "shape": {**asdict(self.shape), "dtype": str(self.shape.dtype)},
            "sink": SINK,
            "window": WINDOW,
            "copy_gb_per_s": self.copy_gb_per_s,
            "results": [{**asdict(row), "gb_per_s": row.gb_per_s} for row in self.results],
        }
        path = self.args.output.with_suffix(".json")
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, path)


def _fill(result: Result, times: Sequence[float]) -> None:
    if times:
        result.ms = statistics.median(times)
        result.spread = (max(times) - min(times)) / result.ms


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "CPU, Triton's interpreter: no times",
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def markdown(bench: Bench) -> str:
    """The table: time, bandwidth, and ratios against s = 0."""
    where = ", ".join(f"{key} {value}" for key, value in bench.environment.items())
    lines = [
        f"{where}. Device copy {bench.copy_gb_per_s:,.0f} GB/s.",
        "",
        "| part | kernel | batch | length | s | ms | GB/s | of copy | time / s=0 | bytes / s=0 | "
        "time / bytes | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {
        (row.part, row.batch, row.length): row
        for row in bench.results
        if row.kernel == "split" and row.sparsity == 0 and row.ms
    }
    for row in bench.results:
        base = dense.get((row.part, row.batch, row.length))
        cells = [row.part, row.kernel, row.batch, row.length, f"{row.sparsity:g}"]
        base_ms = base.ms if base is not None and row.ms else None
        base_bytes = base.gbytes if base is not None and base_ms else None
        time_ratio = row.ms / base_ms if row.ms and base_ms else None
        bytes_ratio = row.gbytes / base_bytes if row.gbytes and base_bytes else None
        speed = row.gb_per_s
        cells += [
            f"{row.ms:.4f}" if row.ms else "",
            f"{speed:,.0f}" if speed else "",
            f"{speed / bench.copy_gb_per_s:.2f}" if speed and bench.copy_gb_per_s else "",
            f"{time_ratio:.3f}" if time_ratio else "",
            f"{bytes_ratio:.3f}" if bytes_ratio else "",
            f"{time_ratio / bytes_ratio:.2f}" if time_ratio and bytes_ratio else "",
            row.note or (f"{row.error:.1e}" if row.error is not None else ""),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(bench: Bench, path: Path) -> None:
    """Decode bandwidth as a share of a device copy, against the length."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
        return
    rows = [row for row in bench.results if row.part == "decode" and row.ms and row.gb_per_s]
    batches = sorted({row.batch for row in rows})
    if not batches:
        return
    figure, axes = plt.subplots(
        1, len(batches), figsize=(3.2 * len(batches), 3.4), sharey=True, squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        kinds = sorted({(row.kernel, row.sparsity) for row in rows if row.batch == batch})
        for kernel, sparsity in kinds:
            line = [r for r in rows if (r.batch, r.kernel, r.sparsity) == (batch, kernel, sparsity)]
            axis.plot(
                [row.length for row in line],
                [(row.gb_per_s or 0) / bench.copy_gb_per_s for row in line],
                marker="o",
                linestyle="-" if kernel == "split" else "--",
                label=f"s={sparsity:g}" if kernel == "split" else kernel,
            )
        axis.set_xscale("log", base=2)
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("context (tokens)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("bytes per second / device copy")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(f"Decode, {bench.environment['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/kernels/kernels"))
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--tune", action="store_true", help="launch parameters, not the cases")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, no GPU, no times")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds; then it stops")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return parser.parse_args(arguments)


def run_tuning(bench: Bench, batches: Sequence[int], lengths: Sequence[int]) -> None:
    decode = [
        DecodeConfig(block_n, warps, stages)
        for block_n, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 5))
    ]
    prefill = [
        PrefillConfig(block_m, block_n, warps, stages)
        for block_m, block_n, warps, stages in itertools.product(
            (64, 128), (32, 64, 128), (4, 8), (2, 3)
        )
    ]
    new = min(4096, max(lengths))
    for config in prefill:
        bench.case("prefill", 1, new, 0.5, new=new, config=config)
    for batch, length in itertools.product(batches, lengths):
        for config in decode:
            bench.case("decode", batch, length, 0.5, config=config)


def run_cases(bench: Bench, quick: bool, dry: bool) -> None:
    """Decode first: what the project stands on. Longest cases last."""
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
    if args.dry_run:
        if not triton.knobs.runtime.interpret:
            print("error: --dry-run needs TRITON_INTERPRET=1 in the environment", file=sys.stderr)
            return 2
        args.rounds, args.dtype = 1, "float32"
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        print(
            "error: no CUDA GPU: run it on one, or TRITON_INTERPRET=1 python "
            "benchmarks/kernels.py --dry-run",
            file=sys.stderr,
        )
        return 2
    bench = Bench(args, device)
    bench.copy()
    if args.tune:
        run_tuning(
            bench, (2,) if args.dry_run else (1, 64), (96,) if args.dry_run else (4096, 8192)
        )
    else:
        run_cases(bench, args.quick, args.dry_run)
    text = markdown(bench)
    args.output.with_suffix(".md").write_text(text)
    plot(bench, args.output.with_suffix(".png"))
    print(text)
    if bench.over():
        print("time limit reached: not all cases were run", file=sys.stderr)
    wrong = [row for row in bench.results if row.note == "WRONG"]
    if wrong:
        print(f"error: {len(wrong)} cases differ from the oracle", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
