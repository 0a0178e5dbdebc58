"""Decode step time of a model of real size: stock vLLM against the split cache, side by side.

    python benchmarks/decode_step.py --batch 16 --context 4096 --sparsity 0.5

Every variant is an engine in a process of its own; they take turns, a few steps
each, so that a machine whose speed drifts is unfair to none. Weights and cache
contents are random: the time of a step does not depend on them. The context is
not computed: the prompts are entered into the prefix cache as if they had been.

Prints a table of medians and ratios, writes JSON with --output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from dummy_model import Shape, enter_into_prefix_cache, write_model

VARIANTS = ("stock", "all-full", "split")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--q-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first step")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--sink", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--variants", default="stock,split", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=4, help="decode steps in a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(args: argparse.Namespace) -> None:
    """Serve turns: one line in, step times in seconds as one JSON line out."""
    import torch
    from vllm import LLM, SamplingParams

    additional = {}
    if args.worker != "stock":
        sparsity = 0.0 if args.worker == "all-full" else args.sparsity
        profile = str(args.folder / "profile.json")
        additional = {"rlkv": {"profile": profile, "sparsity": sparsity}}
    budget = args.rounds * args.steps + 64
    length = args.context + budget
    heads = args.layers * args.kv_heads
    share = 1 - args.sparsity if args.worker == "split" else 1.0
    token_bytes = 2 * args.head_dim * 2
    cache = int(args.batch * heads * token_bytes * (share * (length + 128) + 512) * 1.05)
    llm = LLM(
        str(args.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=length + 64,
        max_num_seqs=args.batch,
        kv_cache_memory_bytes=cache,
        enable_prefix_caching=True,
        additional_config=additional,
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    pattern = torch.randn(1 << 22).to(torch.bfloat16)
    storages = {c.untyped_storage().data_ptr(): c.untyped_storage() for c in runner.kv_caches}
    for storage in storages.values():
        values = torch.empty(0, dtype=torch.bfloat16).set_(storage)
        for part in values.split(len(pattern)):  # touch every page
            part.copy_(pattern[: len(part)])
    params = SamplingParams(temperature=0, max_tokens=budget, ignore_eos=True, detokenize=False)
    rng = random.Random(1)
    # One token more than is cached: a context of whole blocks leaves nothing to prefill.
    size = args.context + 1
    prompts = [[rng.randrange(5, 4000) for _ in range(size)] for _ in range(args.batch)]
    enter_into_prefix_cache(llm, prompts, params)
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    while len(core.scheduler.running) < args.batch or any(
        r.num_computed_tokens < size for r in core.scheduler.running
    ):
        llm.llm_engine.step()
    for _ in range(3):
        llm.llm_engine.step()
    print("READY", flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            llm.llm_engine.step()
            times.append(time.perf_counter() - start)
        assert len(core.scheduler.running) == args.batch
        print("TIMES " + json.dumps(times), flush=True)


def start(args: argparse.Namespace, variant: str, folder: Path) -> subprocess.Popen[str]:
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_PLUGINS": "none" if variant == "stock" else "rlkv",
    }
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--worker",
        variant,
        "--folder",
        str(folder),
    ]
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if not os.environ.get("VERBOSE") else None,
    )
    read(process, "READY")
    return process


def read(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    sys.exit(f"a worker died; run with VERBOSE=1 to see why: {process.args}")


def main() -> None:
    args = parse_args()
    if args.worker:
        worker(args)
        return
    variants = args.variants.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = Shape(
            args.layers,
            args.hidden,
            args.intermediate,
            args.q_heads,
            args.kv_heads,
            args.head_dim,
        )
        write_model(shape, folder, sink=args.sink, window=args.window)
        processes = {variant: start(args, variant, folder) for variant in variants}
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(args.rounds):
            for variant, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                times[variant] += json.loads(read(process, "TIMES"))
        for process in processes.values():
            process.kill()
            process.wait()
    report(args, variants, times)


def report(args: argparse.Namespace, variants: list[str], times: dict[str, list[float]]) -> None:
    medians = {variant: statistics.median(times[variant]) for variant in variants}
    base = medians[variants[0]]
    print(
        f"decode step, batch {args.batch}, context {args.context}, {args.layers} layers x "
        f"{args.kv_heads} KV heads x {args.head_dim}, bf16, sparsity {args.sparsity}, "
        f"{args.threads} threads, {platform.machine()} CPU, {date.today()}"
    )
    for variant in variants:
        spread = sorted(times[variant])
        low, high = spread[len(spread) // 10], spread[-len(spread) // 10 - 1]
        print(
            f"{variant:>9}: median {medians[variant] * 1e3:7.1f} ms "
            f"(10-90%: {low * 1e3:.1f}-{high * 1e3:.1f}), "
            f"{base / medians[variant]:.3f} x the speed of {variants[0]}"
        )
    if args.output:
        figures: dict[str, Any] = {
            "date": str(date.today()),
            "settings": {
                k: v for k, v in vars(args).items() if k not in ("worker", "folder", "output")
            },
            "machine": platform.processor() or platform.machine(),
            "median_seconds": medians,
            "seconds": times,
        }
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
