"""How well the best allocation of full heads at one sparsity serves: a search without gates.

    python benchmarks/allocation_ceiling.py embedded rlkv=runs/rlkv/profile.json --sparsity .4 \
        --output ceiling.json

Answers whether a scorer or the model is to blame for what a sparsity costs. All candidates write
answers to the same problems side by side, with really split heads:

1. Every head streams alone. A head that costs more than --needed that way stays full.
2. Every pair of the other heads streams.
3. Of all allocations, the --candidates whose pairs lost least (the sum of the logarithms of their
   pairs' accuracies) race: all solve 16 problems, the best sixth of them 64, the best sixth of
   those 256.
4. So do all that differ from the best one by an exchange of two heads, needed or not; and once
   more if one of them is better.
5. The best one, and the profiles, which take part in 3, solve --n fresh problems.

Assumed is that streaming more heads does not mend what one head alone breaks, and that the pairs
of a good allocation look good; step 4 tests both near the best one only. OUTPUT.cache.json holds
all answers: the same command continues a killed run, and other sparsities with the same --cache
start with the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.statistics import mcnemar_p, wilson_interval
from rlkv_vllm.profile.io import load_profile, read_json_object, write_text_atomic

Head = tuple[int, int]
Streaming = tuple[Head, ...]  # sorted
RUNGS = (16, 64, 256)  # problems of a race
SURVIVORS = 1 / 6


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
    parser.add_argument("--single-problems", type=int, default=32)
    parser.add_argument("--pair-problems", type=int, default=16)
    parser.add_argument("--needed", type=float, default=0.1, help="see above")
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


class Answers:
    """Who solved which problems: the first ones of a list, as many as were asked for so far.

    Args:
        judge: gets candidates and the problem of each; says which are solved.
        path: keeps the answers.
        chunk: how many are asked for before they are written.
        made_with: what decides the answers; a file with other ones is refused.
    """

    def __init__(
        self,
        judge: Callable[[list[Streaming], list[int]], list[bool]],
        path: Path,
        chunk: int,
        made_with: dict[str, Any],
    ) -> None:
        self._judge, self._path, self._chunk, self._made_with = judge, path, chunk, made_with
        found = read_json_object(path) if path.exists() else {"made_with": made_with, "solved": {}}
        if found.get("made_with") != made_with:
            raise RlkvError(f"{path}: answers of another model or setting: choose another --output")
        self._solved: dict[str, str] = found["solved"]

    def ask(self, candidates: Iterable[Streaming], problems: int) -> dict[Streaming, float]:
        """The share of the first `problems` problems that each candidate solves."""
        wanted = sorted(set(candidates))
        asked = [
            (one, problem)
            for one in wanted
            for problem in range(len(self._solved.get(_name(one), "")), problems)
        ]
        for start in range(0, len(asked), self._chunk):
            part = asked[start : start + self._chunk]
            solved = self._judge([one for one, _ in part], [problem for _, problem in part])
            for (one, _), right in zip(part, solved, strict=True):
                self._solved[_name(one)] = self._solved.get(_name(one), "") + "01"[right]
            kept = {"made_with": self._made_with, "solved": self._solved}
            write_text_atomic(self._path, json.dumps(kept, indent=0) + "\n")
        return {one: self._solved[_name(one)][:problems].count("1") / problems for one in wanted}

    def race(self, candidates: Iterable[Streaming]) -> dict[Streaming, float]:
        """The finalists, best first, with their share of the most problems."""
        left = list(candidates)
        shares: dict[Streaming, float] = {}
        for problems in RUNGS:
            shares = self.ask(left, problems)
            left = sorted(shares, key=lambda one: -shares[one])
            _say(f"{len(left)} x {problems}: {[shares[one] for one in left[:5]]}")
            left = left[: max(3, round(SURVIVORS * len(left)))]
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def search(
    answers: Answers,
    heads: Sequence[Head],
    streaming: int,
    known: Iterable[Streaming],
    args: argparse.Namespace,
) -> tuple[list[Head], dict[Streaming, float]]:
    """Heads that are needed, and the finalists, best first."""
    alone = answers.ask([(head,) for head in heads], args.single_problems)
    full = answers.ask([()], args.single_problems)[()]
    needed = [head for head in heads if alone[(head,)] < full - args.needed]
    free = [head for head in heads if head not in needed]
    _say(f"full {full:.3f}, alone {[(*head, round(alone[(head,)], 2)) for head in heads]}")
    if len(free) < streaming:
        raise RlkvError(f"{len(needed)} heads are needed, {streaming} shall stream: raise --needed")
    pairs = answers.ask(combinations(free, 2), args.pair_problems)
    half = 0.5 / args.pair_problems  # none is impossible
    loss = {pair: -math.log(max(share, half)) for pair, share in pairs.items()}
    tried = sorted(
        combinations(free, streaming),
        key=lambda one: sum(loss[pair] for pair in combinations(one, 2)),
    )
    _say(f"{len(free)} free heads, {len(tried)} allocations, the best {args.candidates} race")
    best = answers.race([*tried[: args.candidates], *known])
    for _ in range(2):
        leader = next(iter(best))
        near = [
            tuple(sorted({*leader, into} - {out}))
            for out in leader
            for into in heads
            if into not in leader
        ]
        best |= answers.race([leader, *near])
        best = dict(sorted(best.items(), key=lambda item: -item[1]))
        if next(iter(best)) == leader:
            break
    return needed, best


def main(args: argparse.Namespace) -> None:
    from compare_scorers import weights_hash  # the script beside this one

    from rlkv_vllm.evaluation.masked import HeadSplit, solve
    from rlkv_vllm.tasks import Problem, get_task
    from rlkv_vllm.training.loading import load_model, set_threads

    if args.seed == args.search_seed:
        raise RlkvError("--search-seed: choose other problems than those of --seed")
    set_threads(args.threads)
    model, tokenizer, fingerprint = load_model(args.model)
    heads = [(i, j) for i in range(fingerprint.num_layers) for j in range(fingerprint.num_kv_heads)]
    task = get_task(args.task)
    problems = task.problems(RUNGS[-1], args.search_seed)
    started = time.process_time()

    def split(streaming: Streaming) -> HeadSplit:
        full = [
            [j for j in range(fingerprint.num_kv_heads) if (i, j) not in streaming]
            for i in range(fingerprint.num_layers)
        ]
        return HeadSplit(full, args.sink, args.window)

    def solved_by(asked: Sequence[Problem], splits: HeadSplit | list[HeadSplit]) -> list[bool]:
        return solve(
            model,
            tokenizer,
            task,
            asked,
            split=splits,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
        ).correct

    def judge(candidates: list[Streaming], which: list[int]) -> list[bool]:
        return solved_by([problems[i] for i in which], [split(one) for one in candidates])

    def fresh(streaming: Streaming) -> list[bool]:
        return solved_by(task.problems(args.n, args.seed), split(streaming))

    known = {}
    for text in args.profiles:
        label, _, path = text.partition("=")
        kept = allocate(load_profile(path).gates, args.sparsity).full
        known[label] = tuple(head for head in heads if head[1] not in kept[head[0]])
    cache = args.cache or args.output.with_suffix(".cache.json")
    names = ("task", "search_seed", "sink", "window", "max_new_tokens")
    made_with = {name: getattr(args, name) for name in names} | {"weights": weights_hash(model)}
    answers = Answers(judge, cache, 8 * args.batch_size, made_with)
    needed, best = search(answers, heads, round(args.sparsity * len(heads)), known.values(), args)
    winner = next(iter(best))
    solved = fresh(winner)
    low, high = wilson_interval(sum(solved), args.n)
    result = {
        "settings": vars(args),
        "needed": needed,
        "finalists": [[one, share] for one, share in best.items()],
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


def _name(streaming: Streaming) -> str:
    return " ".join(f"{layer}.{head}" for layer, head in streaming)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(parse_args())
    except RlkvError as error:
        sys.exit(f"error: {error}")
