"""Rollouts of the gated model: vLLM in gated mode against transformers' generate, in one run.

    python benchmarks/rollouts.py embedded --prompts 64 --samples 4 --rounds 3 --output out.json
    python benchmarks/rollouts.py embedded --prompts 64 --samples 4 --profile --output out.json

Both write the same number of answers to the same prompts with the same gates (at random, in
[0, 1]), sampled at temperature 1 and ended by the same tokens; turns alternate. A turn ends with
the last answer. Transformers' cost per turn grows with its longest answer, vLLM's with all of
them. Tokens per second count the answers' tokens. Seconds of the CPU are those of all processes of
this run, engine included: what counts where other programs run on the same cores. With --profile
vLLM alone writes, under Python's profiler: where a turn's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.hf.loading import load_model, set_threads
from rlkv_vllm.rollouts import colocated
from rlkv_vllm.tasks import get_task
from rlkv_vllm.training.config import make_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="`embedded`, a model folder, or org/name")
    parser.add_argument("--task", default="embedded")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for both")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    return parser.parse_args()


def cpu_seconds() -> float:
    """Of this process and those it has started."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(time.user + time.system for time in times)


#: What a turn consists of: functions (file, name) that do it, and those of them within that are
#: listed themselves.
PARTS: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "attention": ([("gated_cpu.py", "forward")], []),
    "linear layers": ([("_custom_ops.py", "onednn_mm")], []),
    "rest of the model": (
        [("gpu_model_runner.py", "_model_forward")],
        ["attention", "linear layers"],
    ),
    "inputs of a step": (
        [("gpu_model_runner.py", "execute_model")],
        ["attention", "linear layers", "rest of the model"],
    ),
    "sampling": ([("gpu_model_runner.py", "sample_tokens")], []),
    "scheduling": ([("scheduler.py", "schedule"), ("scheduler.py", "update_from_output")], []),
    "collecting answers": ([("output_processor.py", "process_outputs")], []),
}


def profiled(write: Callable[[], object]) -> dict[str, float]:
    """Seconds per part, in one call."""
    profiler = cProfile.Profile()
    profiler.runcall(write)
    stats = pstats.Stats(profiler)
    spent: dict[str, float] = {}
    for part, (functions, listed) in PARTS.items():
        inclusive = sum(
            row[3]
            for (file, _, name), row in stats.stats.items()  # type: ignore[attr-defined]
            if (Path(file).name, name) in functions
        )
        spent[part] = inclusive - sum(spent[other] for other in listed)
    spent["rest"] = stats.total_tt - sum(spent.values())  # type: ignore[attr-defined]
    return spent


def main(args: argparse.Namespace) -> None:
    set_threads(args.threads)
    model, tokenizer, _ = load_model(args.model)
    count = args.prompts * args.samples
    config = make_config(
        {
            "model": args.model,
            "output": str(args.output.parent),
            "rollout": {
                "engine": "vllm-colocate",
                "options": {
                    "max_model_len": 1024,
                    "max_num_seqs": count,
                    "kv_cache_memory_bytes": 1 << 30,
                },
            },
        },
        "rollouts.py",
    )
    prompts = [
        list(tokenizer.apply_chat_template(p.messages, add_generation_prompt=True)["input_ids"])
        for p in get_task(args.task).problems(args.prompts, args.seed)
        for _ in range(args.samples)
    ]
    rng = random.Random(args.seed)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    values = [[rng.random() for _ in range(shape[1])] for _ in range(shape[0])]
    ends = model.generation_config.eos_token_id
    stops = tuple(ends) if isinstance(ends, list) else (ends,)

    def sampling(turn: int) -> Sampling:
        return Sampling(max_tokens=args.max_new_tokens, stop_token_ids=stops, seed=args.seed + turn)

    if args.profile:
        llm = colocated.start_engine(config, args.threads)
        colocated.answers(llm, prompts, sampling(0), values)
        values[0][0] = 0.5
        spent = profiled(lambda: colocated.answers(llm, prompts, sampling(1), values))
        found = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "seconds": spent}
        write_text_atomic(args.output, json.dumps(found, indent=1) + "\n")
        for part, seconds in spent.items():
            print(f"{part:20} {seconds:6.2f} s {seconds / sum(spent.values()):6.1%}")
        return
    rows: dict[str, list[dict[str, float]]] = {"transformers": [], "vllm": []}
    with colocated.ColocatedRollouts(config) as engine, attach_gates(model, *config.span) as gates:
        gates.set_soft(values)

        def by_vllm(turn: int) -> int:
            answers = engine.generate(prompts, sampling(turn), values)
            return sum(len(answer.token_ids) for answer in answers)

        def by_transformers(turn: int) -> int:
            torch.manual_seed(args.seed + turn)
            inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            with torch.no_grad():
                found = model.generate(
                    **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=args.max_new_tokens,
                )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
            ended = torch.isin(found, torch.tensor(stops)).int().cumsum(1)
            return int((ended.cumsum(1) <= 1).sum())

        for turn in range(-1, args.rounds):  # the first is a warm-up
            # Other gates empty the prefix cache, as every step of a job does.
            values[0][0] = (turn + 1) / (args.rounds + 1)
            gates.set_soft(values)
            for name, write in (("transformers", by_transformers), ("vllm", by_vllm)):
                started, cpu_started = time.perf_counter(), cpu_seconds()
                tokens = write(turn)
                seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
                if turn >= 0:
                    rows[name].append({"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens})
                print(
                    f"turn {turn}: {name} {tokens / seconds:.0f} tok/s, {tokens / cpu:.0f} per "
                    "second of the CPU",
                    file=sys.stderr,
                )

    def medians(what: str) -> dict[str, float]:
        return {
            name: statistics.median(row["tokens"] / row[what] for row in found)
            for name, found in rows.items()
        }

    by_wall, by_cpu = medians("seconds"), medians("cpu_seconds")
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "answers": count,
        "turns": rows,
        "tokens_per_second": by_wall,
        "tokens_per_cpu_second": by_cpu,
        "ratio": by_wall["vllm"] / by_wall["transformers"],
        "cpu_ratio": by_cpu["vllm"] / by_cpu["transformers"],
    }
    write_text_atomic(args.output, json.dumps(result, indent=1) + "\n")
    print(
        f"vLLM / transformers: {result['ratio']:.2f} ({by_wall}), by time of the CPU "
        f"{result['cpu_ratio']:.2f} ({by_cpu})"
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except RlkvError as error:
        sys.exit(f"error: {error}")
