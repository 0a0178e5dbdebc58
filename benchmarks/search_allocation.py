"""The best allocation that a swap search finds, beside what scorers find; for a small model.

    python benchmarks/search_allocation.py embedded --start head_profiles/embedded.json \
        --sparsity .4 --output best-40.json

Starts from the profile's allocation and swaps a full with a streaming head while that helps. An
allocation is judged on the model's own correct answers by teacher forcing with hard masks, one
forward pass: an answer is kept if every token of it stays the most likely one, for then greedy
decoding with these streaming heads writes the same answer. The share of answers kept counts, and
among equal ones the cross-entropy. Hours for anything but a small model. The profile it writes
has gates of 1 and 0, and is for this one sparsity; `compare_scorers.py` measures it on problems
that the search has not seen.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from rlkv_vllm.allocation.heads import allocate, check_sparsity
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.masked import solve
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.profile.io import check_matches, load_profile, save_profile
from rlkv_vllm.scorers.optimise import IGNORED, Batch, make_batch
from rlkv_vllm.scorers.scorer import Sample
from rlkv_vllm.tasks import get_task
from rlkv_vllm.training.gated_attention import GatedAttention, attach_gates
from rlkv_vllm.training.loading import load_model, set_threads

Heads = frozenset[tuple[int, int]]  # (layer, KV head), the streaming ones


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="`embedded`, a model folder, or org/name")
    parser.add_argument("--start", type=Path, required=True, help="head profile to start from")
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True, help="head profile to write")
    parser.add_argument("--task", default="embedded")
    parser.add_argument("--n", type=int, default=96, help="problems whose answers judge a swap")
    parser.add_argument("--seed", type=int, default=20270201, help="of the problems")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4, help="through all swaps, at most")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    check_sparsity(args.sparsity)
    set_threads(args.threads)
    profile = load_profile(args.start)
    model, tokenizer, fingerprint = load_model(args.model)
    check_matches(profile, fingerprint)
    task = get_task(args.task)
    result = solve(
        model,
        tokenizer,
        task,
        task.problems(args.n, args.seed),
        max_new_tokens=args.max_new_tokens,
    )
    samples = [Sample(a.prompt_ids, a.output_ids) for a in result.answers if a.is_correct]
    samples.sort(key=lambda sample: len(sample.prompt_ids) + len(sample.completion_ids))
    batches = [make_batch(samples[i : i + 16], model.device) for i in range(0, len(samples), 16)]
    full = allocate(profile.gates, args.sparsity).full
    every = [(i, j) for i, row in enumerate(profile.gates) for j in range(len(row))]
    streaming: Heads = frozenset((i, j) for i, j in every if j not in full[i])
    with attach_gates(model, profile.sink, profile.window) as gates:
        seen: dict[Heads, tuple[float, float]] = {}
        best = (-float(len(samples)), 0.0)

        def kept(value: tuple[float, float]) -> float:
            return 1 + value[0] / len(samples)

        def judge(heads: Heads) -> tuple[float, float]:
            if heads not in seen:
                seen[heads] = _judge(gates, batches, every, heads, best[0])
            return seen[heads]

        best = judge(streaming)
        _tell(f"start {kept(best):.3f} {-best[1]:.4f}")
        started = time.monotonic()
        order = random.Random(args.seed)
        for turn in range(args.rounds):
            before = best
            swaps = [(out, into) for out in every for into in every if out != into]
            order.shuffle(swaps)
            for out, into in swaps:
                if out not in streaming or into in streaming:
                    continue
                other = streaming - {out} | {into}
                value = judge(other)
                if value > best:
                    streaming, best = other, value
                    spent = f"{len(seen)} allocations, {time.monotonic() - started:.0f} s"
                    _tell(f"round {turn}, {spent}: {kept(best):.3f} {-best[1]:.4f}")
            if best == before:
                break
    values = [
        [float((i, j) not in streaming) for j in range(len(row))]
        for i, row in enumerate(profile.gates)
    ]
    found = HeadProfile(
        model=fingerprint,
        gates=values,
        sink=profile.sink,
        window=profile.window,
        provenance=Provenance(
            method="search",
            config={
                "sparsity": args.sparsity,
                "start": profile.provenance.method,
                "allocations": len(seen),
                "kept": kept(best),
                "cross_entropy": -best[1],
                "n": args.n,
            },
            seed=args.seed,
            versions={
                name: importlib.metadata.version(name)
                for name in ("rlkv-vllm", "torch", "transformers")
            },
            created=date.today(),
            data=f"{len(samples)} own correct answers to task {args.task}",
        ),
    )
    save_profile(found, args.output)
    _tell(f"wrote {args.output}: {len(seen)} allocations judged, {kept(best):.1%} of answers kept")


def _judge(
    gates: GatedAttention,
    batches: Sequence[Batch],
    every: Sequence[tuple[int, int]],
    heads: Heads,
    wanted: float,
) -> tuple[float, float]:
    """Minus the number of answers lost, and minus the mean cross-entropy of a token.

    Gives up as soon as more than `-wanted` answers are lost.
    """
    layers = 1 + max(layer for layer, _ in every)
    gates.set_hard([{j for i, j in every if i == n and (i, j) not in heads} for n in range(layers)])
    lost = tokens = 0
    loss = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = gates.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits[:, :-1]
            labels = batch.labels[:, 1:]
            wrong = (logits.argmax(-1) != labels) & (labels != IGNORED)
            lost += int(wrong.any(1).sum())
            if -lost < wanted:
                return -float(lost), -float("inf")
            tokens += int((labels != IGNORED).sum())
            loss += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            ).item()
    return -float(lost), -loss / tokens


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(parse_args())
    except RlkvError as error:
        sys.exit(f"error: {error}")
