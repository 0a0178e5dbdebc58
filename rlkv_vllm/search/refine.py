"""Refinement: a search for the full heads that serve best, from given gates. Not part of RLKV.

Training mixes full and local attention in every head; a served head has one or the other, and
what a mix tolerates says little about two heads of nearly the same gate. So the ranking of the
gates only says where to search, and what counts when serving decides: the share of problems that
the model solves, writing with really split heads (`search`). The sparsities count alike.

The gates' own ranking takes part in the race. It is left only if the winner solves more of problems
that nothing was chosen by, significantly (`level`, one-sided sign test over the problems).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.search.config import RefineConfig
from rlkv_vllm.search.search import (
    Answers,
    Chain,
    Head,
    Judge,
    chain_of,
    most_answers,
    num_in_question,
    search,
)
from rlkv_vllm.statistics import sign_test_p

REFINE_FILE = "refine.json"
#: Between two gates, if they were closer; float32 knows it.
STEP = 1e-6


def refine_gates(
    gates: Sequence[Sequence[float]],
    judge: Judge,
    num_problems: int,
    config: RefineConfig,
    path: Path,
    *,
    seed: int,
    chunk: int,
    writes: bool = True,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Gates in an order that serves better; continues what `path` holds.

    Args:
        gates: where to start, ``[layers][KV heads]``.
        judge: says which problems are solved.
        num_problems: how many problems it has.
        config: `refine` of the job.
        path: keeps answers and result.
        seed: of the choice of problems.
        chunk: answers asked for at once.
        writes: whether this process keeps the file.
        report: called with (answers so far, answers at most); at the end both are their number.

    Returns:
        The values of `gates`, dealt out anew.

    Raises:
        RlkvError: if `path` was made with other settings or another start, or there is nothing
            to choose among or by.
    """
    heads = [(layer, head) for layer, row in enumerate(gates) for head in range(len(row))]
    # As `allocate` breaks ties: of equal gates the lower layer, then the lower head, stays full.
    start = sorted(heads, key=lambda head: (gates[head[0]][head[1]], -head[0], -head[1]))
    lines = sorted({round(share * len(heads)) for share in config.sparsities} - {0, len(heads)})
    if not lines:
        raise RlkvError(
            f"refine.sparsities {config.sparsities}: of {len(heads)} heads all or none stream: "
            "choose others"
        )
    if num_problems < 2:
        raise RlkvError("refine: 2 problems are needed, 1 to test by: raise curriculum.problems")
    problems = min(config.problems, num_problems // 2)
    last = min(2 * config.problems, num_problems)
    order = random.Random(seed).sample(range(num_problems), num_problems)
    settings = config.model_dump(mode="json", exclude={"enabled", "start", "batch_size"})
    made_with = {"config": settings, "seed": seed, "start": start, "problems": num_problems}
    most = most_answers(
        num_in_question(len(heads), lines, config.reach), len(lines), config.candidates, problems
    ) + 2 * len(lines) * (last - problems)
    answers = Answers(
        lambda which, streaming, seed: judge([order[i] for i in which], streaming, seed),
        path,
        chunk,
        made_with,
        seed=seed * 1_000_003,
        writes=writes,
        report=lambda done: report(min(done, most - 1), most),
    )
    given = chain_of(start, lines)
    found = search(
        answers,
        start,
        lines,
        reach=config.reach,
        candidates=config.candidates,
        problems=problems,
        known=[given],
    )
    chosen, p, tested = found.best, 1.0, (0, problems)
    if chosen != given:
        answers.ask([*given, *chosen], last)
        tested = (problems, last)
        p = sign_test_p(_solved(answers, chosen, *tested), _solved(answers, given, *tested))
    is_taken = chosen != given and p <= config.level
    rows = [
        {
            "sparsity": line / len(heads),
            "given": fmean(answers.solved(old, *tested)),
            "found": fmean(answers.solved(new, *tested)),
            "become_streaming": sorted({*new} - {*old}),
            "become_full": sorted({*old} - {*new}),
        }
        for line, old, new in zip(lines, given, chosen, strict=True)
    ]
    answers.keep({"p": p, "is_taken": is_taken, "answers": answers.count, "rows": rows})
    report(answers.count, answers.count)
    return _dealt(gates, start, chosen) if is_taken else [list(row) for row in gates]


def _solved(answers: Answers, chain: Chain, first: int, last: int) -> list[float]:
    """Per problem, the share of the chain's allocations that solve it."""
    rows = (answers.solved(streaming, first, last) for streaming in chain)
    return [fmean(row) for row in zip(*rows, strict=True)]


def _dealt(
    gates: Sequence[Sequence[float]], start: Sequence[Head], chain: Chain
) -> list[list[float]]:
    """The gates' values in the order of `chain`, and in that of `start` where it does not say."""
    ranking = sorted(start, key=lambda head: sum(head not in streaming for streaming in chain))
    values = _distinct(sorted(gate for row in gates for gate in row))
    dealt = dict(zip(ranking, values, strict=True))
    return [[dealt[layer, head] for head in range(len(row))] for layer, row in enumerate(gates)]


def _distinct(values: Sequence[float]) -> list[float]:
    """Ascending values in [0, 1], those that are too close moved apart.

    Of equal gates the place of a head decides which stays full, and no longer the ranking.
    """
    apart: list[float] = []
    for value in values:
        apart.append(max(value, apart[-1] + STEP) if apart else value)
    last = len(apart) - 1
    return [min(value, 1 - STEP * (last - place)) for place, value in enumerate(apart)]
