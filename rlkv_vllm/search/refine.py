"""Refinement of gates: a search for the full heads that serve best. Not part of RLKV.

The ranking of the gates decides where to search, and what counts is the share of problems that the
model solves with really split heads (`search`). All sparsities count alike. The ranking is replaced
only if the winner solves more of problems that were not used for the choice, significantly
(`level`, one-sided sign test over the problems).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.search.answers import Answers
from rlkv_vllm.search.config import SearchConfig
from rlkv_vllm.search.losses import Losses
from rlkv_vllm.search.neighbours import Nested, most_evaluations
from rlkv_vllm.search.search import (
    RACES,
    gain_p,
    heads_in_question,
    most_answers,
    nested_of,
    search,
)
from rlkv_vllm.store import Store

FORMAT = "rlkv refine 2"
#: Between two gates, if they were closer; float32 can represent it.
STEP = 1e-6


class Model(Protocol):
    """A model and problems, which have numbers."""

    def write_answers(
        self, problems: Sequence[int], written: list[dict[str, Any]], save: Callable[[], None]
    ) -> None:
        """Answer `problems` with the full cache, for `cross_entropy`.

        What is in `written` need not be written again; `save` is called after more was added.
        """

    def cross_entropy(self, streaming: Streaming) -> float:
        """Nats per token of its own answers while these heads stream."""

    def solve(
        self, problems: Sequence[int], streaming: Sequence[Streaming], seed: int
    ) -> Sequence[bool]:
        """Which of `problems` are solved, each with streaming heads of its own."""


def refine_gates(
    gates: Sequence[Sequence[float]],
    model: Model,
    num_problems: int,
    config: SearchConfig,
    path: Path,
    *,
    seed: int,
    chunk: int,
    settings: dict[str, Any] | None = None,
    is_writer: bool = True,
    report: Callable[[str, int, int, str], None] = lambda stage, done, total, state: None,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Put gates in an order that serves better; continues what `path` holds.

    `model` is asked for `chunk` answers at once; `settings` is what else decides them. `report` is
    called with a stage ("search" or "cross-entropy"), the answers or evaluations so far, at most,
    and figures in words; at the end of the search both are the number of answers.

    Returns the values of `gates` ``[layers][KV heads]``, reassigned to the heads, and the result:
    ``p``, ``is_taken``, ``answers`` and ``evaluations`` (their numbers) and ``rows`` (a mapping per
    sparsity).

    Raises:
        RlkvError: `path` was made with other settings or another start, or there are no two
            allocations or problems.
    """
    heads = [(layer, head) for layer, row in enumerate(gates) for head in range(len(row))]
    # As `allocate` breaks ties: of equal gates the lower layer, then the lower head, stays full.
    start = sorted(heads, key=lambda head: (gates[head[0]][head[1]], -head[0], -head[1]))
    counts = streaming_counts(config.sparsities, len(heads))
    if num_problems < 2:
        raise RlkvError(
            "2 problems are needed that the model solves with its full cache, one of them for the "
            "test: raise --set tried, or choose another --task"
        )
    problems = min(config.problems, num_problems // 2)
    last = min(2 * config.problems, num_problems)
    order = random.Random(seed).sample(range(num_problems), num_problems)
    most = most_answers(len(counts), config.candidates, problems)
    most += 2 * len(counts) * (last - problems)
    in_question = len(heads_in_question(start, counts, config.margin))
    most_losses = RACES * most_evaluations(in_question, len(counts), config.candidates)
    own = {"search": config.model_dump(mode="json"), "seed": seed, "problems": num_problems}
    store = Store(
        path,
        FORMAT,
        {**(settings or {}), **own, "start": start},
        is_writer=is_writer,
        flag="",
        fix="give the settings and the profile that it was made with, or choose another --output",
    )
    answers = Answers(
        lambda which, streaming, seed: model.solve([order[i] for i in which], streaming, seed),
        store,
        chunk,
        seed=seed * 1_000_003,
        report=lambda done, state: report("search", min(done, most - 1), most, state),
    )
    losses = Losses(
        model.cross_entropy,
        store,
        report=lambda done: report("cross-entropy", done, most_losses, "allocations"),
    )
    if "result" not in store.content:
        written = store.content.setdefault("own_answers", [])
        model.write_answers(order[: min(config.answers, problems)], written, store.save)
    given = nested_of(start, counts)
    best = search(
        answers,
        losses,
        start,
        counts,
        margin=config.margin,
        candidates=config.candidates,
        problems=problems,
        level=config.level,
    )
    p, tested = 1.0, (0, answers.known(given, problems))
    if best != given:
        answers.ask([*given, *best], last)
        tested = (problems, last)
        p = gain_p(answers, best, given, *tested)
    is_taken = best != given and p <= config.level
    rows = [
        {
            "sparsity": count / len(heads),
            "given": fmean(answers.solved(old, *tested)),
            "found": fmean(answers.solved(new, *tested)),
            "become_streaming": sorted({*new} - {*old}),
            "become_full": sorted({*old} - {*new}),
        }
        for count, old, new in zip(counts, given, best, strict=True)
    ]
    result = {
        "p": p,
        "is_taken": is_taken,
        "answers": answers.count,
        "evaluations": losses.count,
        "rows": rows,
    }
    store.content["result"] = result
    store.save()
    report("search", answers.count, answers.count, f"p {p:.2g}")
    return (_reassigned(gates, start, best) if is_taken else [*map(list, gates)]), result


def streaming_counts(sparsities: Sequence[float], heads: int) -> list[int]:
    """Numbers of streaming heads that leave something to choose, at least one, ascending."""
    counts = sorted({round(share * heads) for share in sparsities} - {0, heads})
    if not counts:
        shares = ", ".join(f"{share:g}" for share in sparsities)
        raise RlkvError(
            f"--sparsities {shares}: of {heads} heads all or none stream: choose others"
        )
    return counts


def _reassigned(
    gates: Sequence[Sequence[float]], start: Sequence[Head], nested: Nested
) -> list[list[float]]:
    """The values of `gates` in the order of `nested`, and in that of `start` within it."""
    ranking = sorted(start, key=lambda head: sum(head not in streaming for streaming in nested))
    values = _distinct(sorted(gate for row in gates for gate in row))
    gate_of = dict(zip(ranking, values, strict=True))
    return [[gate_of[layer, head] for head in range(len(row))] for layer, row in enumerate(gates)]


def _distinct(values: Sequence[float]) -> list[float]:
    """Ascending values in [0, 1], those that are too close moved apart.

    Of equal gates the place of a head would decide which stays full, not the ranking.
    """
    apart = [*accumulate(values, lambda before, value: max(value, before + STEP))]
    last = len(apart) - 1
    return [min(value, 1 - STEP * (last - place)) for place, value in enumerate(apart)]
