"""Compile the GPU kernels ahead of time and report registers, spills and shared memory.

    python benchmarks/kernel_resources.py
    python benchmarks/kernel_resources.py --head-dim 128 --group 4 --json resources.json

Triton's compiler and assembler need no GPU: the launches of the product are replayed with the
driver of a device that is not there, so what is compiled is what a GPU of that kind would run.
Exits with 1 if the decode kernel spills registers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rlkv_vllm.kernels.triton.split_attention import (
    LayerCache,
    Workspace,
    split_attention,
    write_cache,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CompileOnlyDriver:
    """Stands in for a GPU's driver as far as compiling asks it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: its name.
        gated: compiled for gated mode.
        capability: compute capability, e.g. 90.
        dtype: of queries and cache.
        head_dim: head dimension.
        group: query heads per KV head.
        block_size: tokens per block.
        splits: KV splits of a full head.
        registers: per thread.
        spilled: bytes per thread in local memory: spills and stack.
        shared: bytes of shared memory per program.
        warps: per program.
        programs_per_sm: that fit one multiprocessor at once, by registers and shared memory.
    """

    kernel: str
    gated: bool
    capability: int
    dtype: str
    head_dim: int
    group: int
    block_size: int
    splits: int
    registers: int
    spilled: int
    shared: int
    warps: int
    programs_per_sm: int


#: Shared memory per multiprocessor in bytes (CUDA C programming guide, compute capabilities).
SHARED_PER_SM = {
    80: 164 << 10,
    86: 100 << 10,
    89: 100 << 10,
    90: 228 << 10,
    100: 228 << 10,
    120: 100 << 10,
}


def compile_case(
    capability: int,
    dtype: str,
    head_dim: int,
    group: int,
    block_size: int,
    target_programs: int,
    *,
    gated: bool,
) -> list[Resources]:
    """Compile write, decode, merge and prefill as a layer of 8 KV heads launches them."""
    num_heads, num_requests, n = 8, 4, 64
    kind = DTYPES[dtype]
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel, kwargs.get("NUM_SPLITS", 1)))
        return kernel

    caches = [torch.empty(4, block_size, 2 * head_dim, dtype=kind) for _ in range(num_heads)]
    cache = LayerCache.of(caches, [gated or h % 2 == 1 for h in range(num_heads)])
    workspace = Workspace.of(
        max_requests=num_requests,
        num_q_heads=num_heads * group,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        device="cpu",
        gated=gated,
        target_programs=target_programs,
        capability=capability,
    )
    q = torch.empty(n, num_heads * group, head_dim, dtype=kind)
    k, v = (torch.empty(n, num_heads, head_dim, dtype=kind) for _ in range(2))
    slots = torch.zeros(n, dtype=torch.int64)
    table = torch.zeros(num_requests, 1024, dtype=torch.int32)
    driver.set_active(CompileOnlyDriver(capability))
    JITFunction.run = compile_only
    try:
        write_cache(k, v, cache, slots, slots)
        split_attention(
            q,
            k,
            v,
            torch.empty_like(q),
            cache,
            full_table_RB=table,
            ring_table_RB=table,
            query_start_loc=torch.zeros(num_requests + 1, dtype=torch.int32),
            seq_lens=torch.zeros(num_requests, dtype=torch.int32),
            max_query_len=n,
            workspace=workspace,
            sink=16,
            window=64,
            scale=head_dim**-0.5,
            gates_H=torch.ones(num_heads) if gated else None,
        )
    finally:
        JITFunction.run = run
        driver.set_active(None)
    return [
        _resources(name, gated, kernel, capability, dtype, head_dim, group, block_size, splits)
        for name, kernel, splits in compiled
        if not gated or name != "write_kernel"  # gates change nothing of it
    ]


def _resources(
    name: str,
    gated: bool,
    kernel: Any,
    capability: int,
    dtype: str,
    head_dim: int,
    group: int,
    block_size: int,
    splits: int,
) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    by_registers = 65536 // (max(usage["REG"], 1) * 32 * warps)
    by_shared = SHARED_PER_SM.get(capability, 100 << 10) // (shared + 1024)
    return Resources(
        kernel=name,
        gated=gated,
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        group=group,
        block_size=block_size,
        splits=splits,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        warps=warps,
        programs_per_sm=min(by_registers, by_shared, 64 // warps),
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=_numbers, default=[80, 90])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--head-dim", type=_numbers, default=[64, 96, 128, 256])
    parser.add_argument("--group", type=_numbers, default=[1, 4, 7, 16])
    parser.add_argument("--block-size", type=_numbers, default=[16])
    parser.add_argument("--target-programs", type=int, default=528, help="4 per multiprocessor")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args(arguments)
    rows: list[Resources] = []
    print(f"triton {triton.__version__}, torch {torch.__version__}", file=sys.stderr)
    print(
        "| kernel | gated | sm | dtype | head_dim | group | block | splits | registers | spilled | "
        "shared | warps | programs per SM |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for capability, head_dim, group, block_size, gated in itertools.product(
        args.capability, args.head_dim, args.group, args.block_size, (False, True)
    ):
        for row in compile_case(
            capability,
            args.dtype,
            head_dim,
            group,
            block_size,
            args.target_programs,
            gated=gated,
        ):
            if row not in rows:
                rows.append(row)
                print("| " + " | ".join(str(v) for v in asdict(row).values()) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    spilling = [row for row in rows if row.kernel == "decode_kernel" and row.spilled]
    if spilling:
        print(f"error: {len(spilling)} decode kernels spill registers", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
