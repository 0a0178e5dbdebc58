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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from common import Requests, environment, header, parser, row, write_json
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
        requests: Requests,
        sparsity: float,
        device: torch.device,
        *,
        gated: bool = False,
        target_programs: int = 8,
        capability: int = INTERPRETER,
    ) -> None:
        self.shape, self.requests, on_gpu = shape, requests, device.type == "cuda"
        heads, bs = shape.num_kv_heads, shape.block_size
        num_streaming = round(sparsity * heads)
        num_full = heads - num_streaming
        self.streaming = [h >= num_full for h in range(heads)]
        full = requests.block_table(bs)
        ring = full if gated else requests.block_table(bs, SINK, WINDOW)
        self.full_table, self.ring_table = full.table.to(device), ring.table.to(device)
        self.slots = full.slots.to(device), ring.slots.to(device)
        self.starts, self.seq_lens = requests.starts.to(device), requests.lengths.to(device)
        tokens = num_full * requests.context
        tokens += num_streaming * min(requests.context, SINK + WINDOW)
        self.kv_bytes = requests.batch * shape.row_bytes * tokens
        blocks = num_full * full.num_blocks + num_streaming * ring.num_blocks
        layer_bytes = blocks * bs * shape.row_bytes
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else 4 << 30
        wanted = triton.cdiv(LEAST_BYTES if on_gpu else 0, max(self.kv_bytes, 1))
        self.num_layers = max(1, min(wanted, int(free * 0.8) // layer_bytes, 64))
        if layer_bytes * self.num_layers > free * 0.9:
            raise MemoryError(f"needs {layer_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free")

        def normal(*sizes: int) -> torch.Tensor:
            return torch.empty(*sizes, shape.head_dim, dtype=shape.dtype, device=device).normal_()

        self.normal = normal
        self.caches = []
        self.full_pages = []  # [heads, blocks, block_size, 2, head_dim], as vLLM's buffers lie
        for _ in range(self.num_layers):
            pages = normal(num_full, full.num_blocks, bs, 2)
            self.full_pages.append(pages)
            caches = [*pages.flatten(3), *normal(num_streaming, ring.num_blocks, bs, 2).flatten(3)]
            self.caches.append(LayerCache.of(caches, [gated or kind for kind in self.streaming]))
        n = requests.batch * requests.new
        self.q, self.k, self.v = normal(n, heads * shape.group), normal(n, heads), normal(n, heads)
        self.out = torch.empty_like(self.q)
        self.gates = torch.linspace(0.1, 0.9, heads).to(device) if gated else None
        self.spans = {"sink": SINK, "window": WINDOW, "scale": shape.head_dim**-0.5}
        self.workspace = Workspace.of(
            max_requests=requests.batch,
            num_q_heads=heads * shape.group,
            num_kv_heads=heads,
            head_dim=shape.head_dim,
            device=device,
            gated=gated,
            target_programs=None if on_gpu else target_programs,
            capability=None if on_gpu else capability,
        )

    def write(self) -> None:
        for cache in self.caches:
            write_cache(self.k, self.v, cache, *self.slots)

    def attend(self, **configs: DecodeConfig | PrefillConfig) -> None:
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
                max_query_len=self.requests.new,
                workspace=self.workspace,
                gates_H=self.gates,
                **self.spans,
                **configs,
            )

    def error(self) -> float:
        """Relative error of the last layer's output against the oracle, worst of two requests."""
        bs, new = self.shape.block_size, self.requests.new
        position = torch.arange(self.requests.context, device=self.q.device)
        last = min(new, 256)  # they see most; the oracle holds all scores at once
        full_heads = [h for h, kind in enumerate(self.streaming) if not kind]
        worst = 0.0
        for r in {0, self.requests.batch - 1}:
            tables = [self.ring_table[r] if kind else self.full_table[r] for kind in self.streaming]
            heads = [
                pages[table[position // bs].long(), position % bs]
                for pages, table in zip(self.caches[-1].caches, tables, strict=True)
            ]
            k, v = torch.stack(heads, dim=1).float().chunk(2, -1)
            rows = slice(r * new, (r + 1) * new)
            # What lean prefill does not keep comes from the step's inputs.
            if new > 1:
                k[-new:], v[-new:] = self.k[rows], self.v[rows]
            attend = partial(reference_attention, self.q[rows][-last:].float(), k, v, **self.spans)
            expected = attend(full_heads=full_heads)
            if self.gates is not None:
                gates = self.gates.repeat_interleave(self.shape.group)[:, None]
                expected = gates * expected + (1 - gates) * attend(full_heads=[])
            found = self.out[rows][-last:].float()
            worst = max(worst, float((found - expected).norm() / expected.norm()))
        return worst


def dense_kernels(layers: Layers) -> Iterator[tuple[str, Callable[[], None]]]:
    """Dense attention of others over the same number of tokens, where installed."""
    if not layers.q.is_cuda:
        return
    shape, requests, scale = layers.shape, layers.requests, layers.spans["scale"]
    size = (1 + layers.full_table.numel(), shape.block_size, shape.num_kv_heads)
    pages = [layers.normal(2, *size) for _ in range(layers.num_layers)]
    shared = {
        "cu_seqlens_q": layers.starts,
        "max_seqlen_q": requests.new,
        "seqused_k": layers.seq_lens,
        "max_seqlen_k": requests.context,
        "softmax_scale": scale,
        "causal": True,
        "block_table": layers.full_table,
        "out": torch.empty_like(layers.q),
    }

    def each(attend: Callable[..., Any], caches: Sequence[torch.Tensor]) -> None:
        for k, v in caches:
            attend(q=layers.q, k=k, v=v, **shared)

    with suppress(ImportError):
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        rows = (requests.batch, shape.num_kv_heads * shape.group, 16)
        empty = partial(torch.empty, dtype=torch.float32, device=layers.q.device)
        unified = partial(
            unified_attention,
            window_size=(-1, -1),
            seq_threshold_3D=128 // shape.num_kv_heads,
            num_par_softmax_segments=rows[-1],
            softmax_segm_output=empty(*rows, triton.next_power_of_2(shape.head_dim)),
            softmax_segm_max=empty(rows),
            softmax_segm_expsum=empty(rows),
            softcap=0,
            **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
        )
        yield "vLLM Triton unified", partial(each, unified, pages)
    with suppress(ImportError):
        from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported

        flash = partial(flash_attn_varlen_func, fa_version=3 if is_fa_version_supported(3) else 2)
        yield "FlashAttention", partial(each, flash, pages)
        # The same on our pages: what full heads could use instead of our kernel.
        strided = [full.permute(3, 1, 2, 0, 4) for full in layers.full_pages]
        yield "FlashAttention, our pages", partial(each, flash, strided)
    if requests.new == requests.context and requests.batch == 1:
        q, k, v = (t.transpose(0, 1)[None] for t in (layers.q, layers.k, layers.v))

        def sdpa() -> None:
            for _ in range(layers.num_layers):
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=True
                )

        yield "torch SDPA", sdpa


class Bench:
    """Runs cases until the time is up; what was measured is on disk after each."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.output, self.device = args.output, device
        dtype = getattr(torch, args.dtype)
        self.shape = Shape(args.kv_heads, args.group, args.head_dim, args.block_size, dtype)
        self.deadline = time.monotonic() + args.time_limit
        self.results: list[Result] = []
        self.environment = environment()
        self.copy_gb_per_s = 0.0

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def time(self, result: Result, run: Callable[[], Any]) -> None:
        """Time as a CUDA graph, per layer; without a GPU run once."""
        if self.device.type != "cuda":
            run()
            return
        median, least, most = triton.testing.do_bench_cudagraph(run, quantiles=(0.5, 0, 1))
        result.ms, result.spread = median / result.layers, (most - least) / median

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
        write_json(self.output.with_suffix(".json"), figures)
        print(self.table_row(result), flush=True)

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
            requests = Requests(batch, length, new)
            layers = Layers(self.shape, requests, sparsity, self.device, gated=gated)
            result.layers = layers.num_layers
            if part == "write":
                result.gbytes = 2 * 2 * layers.k.nbytes / 1e9
                self.time(result, layers.write)
            else:
                if part == "decode":
                    result.gbytes = (layers.kv_bytes + 2 * layers.q.nbytes) / 1e9
                layers.write()
                self.time(result, partial(layers.attend, **{f"{part}_with": config}))
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
        for name, run in dense_kernels(layers):
            result = replace(ours, kernel=name, ms=None, spread=None, error=None, note="")
            try:
                self.time(result, run)
            except (RuntimeError, AttributeError, TypeError) as error:
                print(f"{name} does not run: {error}".split("\n")[0], file=sys.stderr)
            else:
                self.add(result)

    def table_row(self, found: Result) -> str:
        speed, copy = found.gb_per_s, self.copy_gb_per_s
        case = (found.part, found.kernel, found.batch, found.length, f"{found.sparsity:g}")
        figures = (
            f"{found.ms:.4f}" if found.ms else None,
            f"{speed:,.0f}" if speed else None,
            f"{speed / copy:.2f}" if speed and copy else None,
            found.note or (None if found.error is None else f"{found.error:.1e}"),
        )
        return row([*case, *figures])


HEADER = header("part", "kernel", "batch", "length", "s", "ms", "GB/s", "of copy", "error")


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
    decodes = sorted(itertools.product(lengths, batches), key=lambda c: c[0] * c[1])
    cases = [("decode", batch, length, 1) for length, batch in decodes]
    cases += [("prefill", 1, length, length) for length in prompts]
    for part, batch, length, new in cases:
        for sparsity in SPARSITIES:
            bench.case(part, batch, length, sparsity, new=new, dense=sparsity == 0)
        bench.case(part, batch, length, 0.0, new=new, gated=True)
    for sparsity in (0.0, 0.5):
        new = max(2, prompts[-1] // 4)
        bench.case("prefill", 1, prompts[-1], sparsity, new=new, dense=sparsity == 0)
    for batch in batches:
        bench.case("write", batch, lengths[0], 0.5)


def main() -> None:
    options = parser(__doc__, kv_heads=8, head_dim=128, block_size=16)
    options.add_argument("--output", type=Path, default=Path("runs/kernels/kernels"))
    options.add_argument("--quick", action="store_true", help="few cases")
    options.add_argument("--tune", action="store_true", help="launch parameters, not the cases")
    options.add_argument("--dry-run", action="store_true", help="tiny cases, no GPU, no times")
    options.add_argument("--time-limit", type=float, default=480, help="seconds; then it stops")
    options.add_argument("--group", type=int, default=4, help="query heads per KV head")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = options.parse_args()
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.dry_run:
        args.dtype = "float32"
        if not triton.knobs.runtime.interpret:
            options.error("--dry-run needs TRITON_INTERPRET=1 in the environment")
    elif not torch.cuda.is_available():
        dry_run = "TRITON_INTERPRET=1 python benchmarks/kernels.py --dry-run"
        options.error(f"no CUDA GPU: run it on one, or {dry_run}")
    bench = Bench(args, device)
    print(HEADER)
    bench.copy()
    if args.tune:
        run_tuning(bench, *(((2,), (96,)) if args.dry_run else ((1, 64), (4096, 8192))))
    else:
        run_cases(bench, args.quick, args.dry_run)
    where = ", ".join(f"{key} {value}" for key, value in bench.environment.items())
    head = [f"{where}. Device copy {bench.copy_gb_per_s:,.0f} GB/s.", "", HEADER]
    rows = [bench.table_row(result) for result in bench.results]
    args.output.with_suffix(".md").write_text("\n".join([*head, *rows, ""]))
    if bench.is_over:
        print("time limit reached: not all cases were run", file=sys.stderr)
    wrong = [result for result in bench.results if result.note == "WRONG"]
    if wrong:
        sys.exit(f"error: {len(wrong)} cases differ from the oracle")


if __name__ == "__main__":
    main()
