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
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, header, numbers, parser, row, write_json
from kernels import Layers, Shape
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Bytes of shared memory per multiprocessor by compute capability (CUDA C programming guide).
SHARED_PER_SM = {
    80: 164 << 10,
    86: 100 << 10,
    89: 100 << 10,
    90: 228 << 10,
    100: 228 << 10,
    120: 100 << 10,
}


class CompileOnlyDriver:
    """Stands in for a GPU's driver as far as compiling needs it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_case(
    capability: int, shape: Shape, target_programs: int, *, gated: bool
) -> list[dict[str, Any]]:
    """Compile write, decode, merge and prefill as a layer of 8 KV heads launches them."""
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.fn.__name__
        if not gated or name != "write_kernel":  # gates do not change it
            compiled.append(
                {
                    "kernel": name,
                    "gated": gated,
                    "capability": capability,
                    "dtype": str(shape.dtype).removeprefix("torch."),
                    "head_dim": shape.head_dim,
                    "group": shape.group,
                    "block_size": shape.block_size,
                    "splits": kwargs.get("NUM_SPLITS", 1),
                    **resources(kernel, capability),
                }
            )
        return kernel

    layers = Layers(
        shape,
        batch=4,
        length=16 * shape.block_size,
        sparsity=0.5,
        device=torch.device("cpu"),
        new=16,
        gated=gated,
        target_programs=target_programs,
        capability=capability,
    )
    driver.set_active(CompileOnlyDriver(capability))
    JITFunction.run = compile_only
    try:
        layers.write()
        layers.attend()
    finally:
        JITFunction.run = run
        driver.set_active(None)
    return compiled


def resources(kernel: Any, capability: int) -> dict[str, int]:
    """Registers and spilled bytes per thread, shared bytes and warps per program."""
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
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "warps": warps,
        "programs_per_sm": min(by_registers, by_shared, 64 // warps),
    }


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--capability", type=numbers, default=[80, 90])
    found.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    found.add_argument("--head-dim", type=numbers, default=[64, 96, 128, 256])
    found.add_argument("--group", type=numbers, default=[1, 4, 7, 16])
    found.add_argument("--block-size", type=numbers, default=[16])
    found.add_argument("--target-programs", type=int, default=528, help="4 per multiprocessor")
    found.add_argument("--json", type=Path, help="write the figures here too")
    return found.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for capability, head_dim, group, block_size, gated in itertools.product(
        args.capability, args.head_dim, args.group, args.block_size, (False, True)
    ):
        shape = Shape(8, group, head_dim, block_size, getattr(torch, args.dtype))
        for found in compile_case(capability, shape, args.target_programs, gated=gated):
            if not rows:
                print(header(*found))
            rows.append(found)
            print(row(found.values()), flush=True)
    if args.json:
        write_json(args.json, {"environment": environment(), "kernels": rows})
    spilling = [found for found in rows if found["kernel"] == "decode_kernel" and found["spilled"]]
    if spilling:
        print(f"error: {len(spilling)} decode kernels spill registers", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
