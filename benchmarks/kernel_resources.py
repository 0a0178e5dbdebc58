"""Compile the GPU kernels ahead of time and report registers, spills and shared memory.

    python benchmarks/kernel_resources.py
    python benchmarks/kernel_resources.py --head-dim 128 --group 4 --json resources.json

Triton's compiler and assembler need no GPU: the launches of the product are replayed with the
driver of a device that is not there, so what is compiled is what a GPU of that kind would run.
Exits with 1 if the decode kernel spills registers.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import Requests, environment, header, parser, row, write_json
from kernels import Layers, Shape
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Bytes of shared memory per multiprocessor by compute capability (CUDA C programming guide), where
#: they are not 100 KiB.
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


def driver_without_device(capability: int) -> Any:
    """As much of a GPU's driver as compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )


def compile_case(
    capability: int, shape: Shape, target_programs: int, *, gated: bool
) -> list[dict[str, Any]]:
    """Compile write, decode, merge and prefill as a layer of 8 KV heads launches them."""
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = run(self, *args, warmup=True, **kwargs)
        name = self.fn.__name__
        if not gated or name != "write_kernel":  # gates do not change it
            case: dict[str, Any] = {"kernel": name, "gated": gated, "capability": capability}
            case["dtype"] = str(shape.dtype).removeprefix("torch.")
            case |= {size: getattr(shape, size) for size in ("head_dim", "group", "block_size")}
            case["splits"] = kwargs.get("NUM_SPLITS", 1)
            compiled.append(case | resources(kernel, capability))
        return kernel

    requests = Requests(4, 16 * shape.block_size, 16)
    gpu: dict[str, int] = {"target_programs": target_programs, "capability": capability}
    layers = Layers(shape, requests, 0.5, torch.device("cpu"), gated=gated, **gpu)
    driver.set_active(driver_without_device(capability))
    try:
        with patch.object(JITFunction, "run", compile_only):
            layers.write()
            layers.attend()
    finally:
        driver.set_active(None)
    return compiled


def resources(kernel: Any, capability: int) -> dict[str, int]:
    """Registers and spilled bytes per thread, shared bytes and warps per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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


def main() -> None:
    sizes = {"head_dim": [64, 96, 128, 256], "group": [1, 4, 7, 16], "block_size": [16]}
    options = parser(__doc__, capability=[80, 90], **sizes)
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options.add_argument("--target-programs", type=int, default=528, help="4 per multiprocessor")
    options.add_argument("--json", type=Path, help="write the figures here too")
    args = options.parse_args()
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
    write_json(args.json, {"environment": environment(), "kernels": rows})
    spilling = [found for found in rows if found["kernel"] == "decode_kernel" and found["spilled"]]
    if spilling:
        sys.exit(f"error: {len(spilling)} decode kernels spill registers")


if __name__ == "__main__":
    main()
