"""How well the best allocation of full heads at one sparsity serves: a search without gates.

    python benchmarks/allocation_ceiling.py embedded rlkv=runs/rlkv/profile.json --sparsity .4 \
        --output ceiling.json

Answers whether a scorer or the model is to blame for what a sparsity costs. It is the search of
`rlkv train`'s refinement (rlkv_vllm/search/search.py) with all heads in question, wider, and from
nothing: its ranking is the order of the heads in the model. The best allocation, and the profiles,
which take part in the race, solve --n fresh problems.

Assumed is that streaming more heads does not mend what one head alone breaks, and that the pairs
of a good allocation look good; the last step of the search tests both near the best one only.
OUTPUT.cache.json holds all answers: the same command continues a killed run, and other sparsities
with the same --cache start with the pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.search.search import Answers, Streaming, full_heads, search
from rlkv_vllm.statistics import mcnemar_p, wilson_interval


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="`embedded`, a model folder, or org/name")
    parser.add_argument("profiles", nargs="*", metavar="LABEL=PROFILE", help="take part")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--cache", type=Path, help="instead of OUTPUT.cache.json")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--problems", type=int, default=256, help="that finalists solve")
    parser.add_argument("--task", default="embedded")
    parser.add_argument("--search-seed", type=int, default=777, help="of the search's problems")
    parser.add_argument("--n", type=int, default=300, help="fresh problems")
    parser.add_argument("--seed", type=int, default=20270101, help="of the fresh problems")
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    from compare_scorers import weights_hash  # the script beside this one

    from rlkv_vllm.answers import Sampling
    from rlkv_vllm.hf.answers import HeadSplit, solve
    from rlkv_vllm.hf.loading import load_model, set_threads
    from rlkv_vllm.tasks import Problem, get_task

    if args.seed == args.search_seed:
        raise RlkvError("--search-seed: choose other problems than those of --seed")
    set_threads(args.threads)
    model, tokenizer, fingerprint = load_model(args.model)
    layers, kv_heads = fingerprint.num_layers, fingerprint.num_kv_heads
    heads = [(i, j) for i in range(layers) for j in range(kv_heads)]
    streaming_heads = round(args.sparsity * len(heads))
    if not 0 < streaming_heads < len(heads):
        raise RlkvError(f"--sparsity {args.sparsity}: nothing to choose: {streaming_heads} stream")
    task = get_task(args.task)
    problems = task.problems(args.problems, args.search_seed)
    started = time.process_time()

    def split(streaming: Streaming) -> HeadSplit:
        return HeadSplit(full_heads(streaming, layers, kv_heads), args.sink, args.window)

    def solved_by(asked: Sequence[Problem], splits: HeadSplit | list[HeadSplit]) -> list[bool]:
        return solve(
            model,
            tokenizer,
            task,
            asked,
            split=splits,
            sampling=Sampling(max_tokens=args.max_new_tokens, temperature=0),
            batch_size=args.batch_size,
        ).correct

    def judge(which: Sequence[int], streaming: Sequence[Streaming], _seed: int) -> list[bool]:
        return solved_by([problems[i] for i in which], [split(one) for one in streaming])

    def fresh(streaming: Streaming) -> list[bool]:
        return solved_by(task.problems(args.n, args.seed), split(streaming))

    known = {}
    for text in args.profiles:
        label, _, path = text.partition("=")
        kept = allocate(load_profile(path).gates, args.sparsity).full
        known[label] = tuple(head for head in heads if head[1] not in kept[head[0]])
    names = ("task", "search_seed", "problems", "sink", "window", "max_new_tokens")
    answers = Answers(
        judge,
        args.cache or args.output.with_suffix(".cache.json"),
        args.batch_size,
        {name: getattr(args, name) for name in names} | {"weights": weights_hash(model)},
        report=lambda count: _say(f"{count} answers"),
    )
    found = search(
        answers,
        heads,
        [streaming_heads],
        reach=len(heads),
        candidates=args.candidates,
        problems=args.problems,
        known=[(streaming,) for streaming in known.values()],
    )
    (winner,) = found.best
    solved = fresh(winner)
    low, high = wilson_interval(sum(solved), args.n)
    result = {
        "settings": vars(args),
        "needed": found.needed,
        "finalists": [[one, share] for (one,), share in found.finalists.items()],
        "streaming": winner,
        "solved": sum(solved) / args.n,
        "interval": [low, high],
        "seconds": time.process_time() - started,
        "known": {},
    }
    for label, streaming in known.items():
        theirs = fresh(streaming)
        result["known"][label] = {
            "streaming": streaming,
            "solved": sum(theirs) / args.n,
            "p": mcnemar_p(solved, theirs),
        }
    write_text_atomic(args.output, json.dumps(result, default=str) + "\n")
    _say(json.dumps({key: result[key] for key in ("streaming", "solved", "interval", "seconds")}))
    _say(json.dumps(result["known"]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(parse_args())
    except RlkvError as error:
        sys.exit(f"error: {error}")
