"""Refinement: exchanges heads while the reward of really split heads rises. Not part of RLKV.

Training mixes full and local attention in every head; a served head has one or the other, and
what a mix tolerates says little about two heads of nearly the same gate. So heads on either side
of the line between full and streaming heads are exchanged, and every exchange is judged by what
counts when serving: the share of problems that the model solves, writing with these full heads.
All candidates write their answers to the same problems side by side, each sequence with its own
full heads. The model makes no backward pass.

A round takes one sparsity after the other, the highest first. Every exchange of one of the `reach`
last streaming heads with one of the `reach` next full heads is tried on a few problems: pairs, and
not single heads, because two heads may do the same work, of which one is needed. The best
`finalists` are tried again on twice as many fresh problems, at all sparsities. If the best one
solves more of those than no exchange does, it is tried on four times as many fresh ones, which it
was not chosen by, and made if its gain there is significant (`level`, one-sided sign test over the
problems). A round without an exchange is the last one.

The log of the rounds is the checkpoint: a round depends on nothing but the ranking before it, the
seed and its own number.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.statistics import sign_test_p
from rlkv_vllm.profile.io import write_text_atomic
from rlkv_vllm.training.config import RefineConfig
from rlkv_vllm.training.run_folder import step_rows

REFINE_LOG_FILE = "refine.jsonl"

Head = tuple[int, int]
#: All heads, the one that becomes a streaming head first at the front.
Ranking = tuple[Head, ...]
#: Full heads per layer.
Allocation = tuple[tuple[int, ...], ...]
#: Gets problems, an allocation for each, and a seed; gives a reward for each.
Judge = Callable[[Sequence[int], Sequence[Allocation], int], Sequence[float]]


def refine_gates(
    gates: Sequence[Sequence[float]],
    judge: Judge,
    num_problems: int,
    config: RefineConfig,
    log: Path,
    *,
    seed: int,
    writes: bool = True,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Gates in an order that serves better; continues what `log` holds.

    Args:
        gates: where to start, ``[layers][KV heads]``.
        judge: gives rewards.
        num_problems: how many problems it has, at least one.
        config: `refine` of the job.
        log: a line per round.
        seed: of the choice of problems.
        writes: whether this process keeps the log.
        report: called with (rounds done, rounds in all).

    Returns:
        The values of `gates`, dealt out anew.

    Raises:
        RlkvError: if `log` was made with other settings or another start.
    """
    heads = [(layer, head) for layer, row in enumerate(gates) for head in range(len(row))]
    # As `allocate` breaks ties: of equal gates the lower layer, then the lower head, stays full.
    start = sorted(heads, key=lambda head: (gates[head[0]][head[1]], -head[0], -head[1]))
    # More rounds go on where fewer ended.
    settings = config.model_dump(mode="json", exclude={"rounds", "start", "batch_size"})
    made_with = {"config": settings, "seed": seed, "start": start}
    rows = _read(log, json.loads(json.dumps(made_with)))
    if writes:
        write_text_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
    ranking: Ranking = tuple((layer, head) for layer, head in rows[-1]["ranking"])
    before, started = rows[-1]["elapsed"], time.monotonic()
    lines = {round(sparsity * len(heads)): f"{sparsity:g}" for sparsity in config.sparsities}
    for step in range(rows[-1]["step"] + 1, config.rounds + 1):
        if _is_settled(rows[-1]):
            break
        this = _Round(judge, num_problems, config, seed, step)
        changes: dict[str, dict[str, Any]] = {}
        for line in sorted(lines, reverse=True):
            change = this.improve(ranking, list(lines), line)
            ranking = change.ranking
            changes[lines[line]] = {
                "exchange": change.exchange,
                "before": change.before,
                "after": change.after,
                "p": change.p,
            }
        row = {
            "step": step,
            "changes": changes,
            "answers": this.answers,
            "ranking": ranking,
            "elapsed": before + time.monotonic() - started,
        }
        rows.append(row)
        if writes:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        report(step, config.rounds)
    values = sorted(gate for row in gates for gate in row)
    dealt = dict(zip(ranking, values, strict=True))
    return [[dealt[layer, head] for head in range(len(row))] for layer, row in enumerate(gates)]


@dataclass(frozen=True)
class _Change:
    """What a round did at one sparsity.

    Attributes:
        ranking: the next one.
        exchange: streaming head and full head, if the next one is another one.
        before: mean reward of the old ranking over all sparsities, on the last problems tried.
        after: that of the next one.
        p: of the gain of the best exchange; None if it had none among the finalists.
    """

    ranking: Ranking
    exchange: tuple[Head, Head] | None
    before: float
    after: float
    p: float | None


class _Round:
    """One round; its random numbers are its own.

    Attributes:
        answers: how many the model wrote.
    """

    def __init__(
        self, judge: Judge, num_problems: int, config: RefineConfig, seed: int, step: int
    ) -> None:
        self._judge = judge
        self._config = config
        self._seed = seed * 1_000_003 + step
        self._order = random.Random(self._seed).sample(range(num_problems), num_problems)
        self.answers = 0

    def improve(self, ranking: Ranking, lines: Sequence[int], line: int) -> _Change:
        """The best exchange across `line`, or none.

        Args:
            ranking: the old one.
            lines: numbers of streaming heads that count.
            line: one of them.
        """
        reach, problems = self._config.reach, self._config.problems
        tried = {
            _exchanged(ranking, out, into): (out, into)
            for out in ranking[max(0, line - reach) : line]
            for into in ranking[line : line + reach]
        }
        worth = _means(self._rewards([ranking, *tried], [line], problems))
        finalists = sorted(tried, key=lambda other: -worth[other])[: self._config.finalists]
        worth = _means(self._rewards([ranking, *finalists], lines, 2 * problems))
        best = max([ranking, *finalists], key=lambda other: worth[other])  # the old one, if as good
        if best == ranking:
            return _Change(ranking, None, worth[ranking], worth[ranking], None)
        rewards = self._rewards([ranking, best], lines, 4 * problems)
        worth = _means(rewards)
        p = sign_test_p(rewards[best], rewards[ranking])
        after = best if p <= self._config.level else ranking
        return _Change(after, tried.get(after), worth[ranking], worth[after], p)

    def _rewards(
        self, rankings: Sequence[Ranking], lines: Sequence[int], problems: int
    ) -> dict[Ranking, list[float]]:
        """For every ranking the mean reward over `lines` of each of the next problems."""
        at = {
            ranking: [_allocation(ranking, frozenset(ranking[:line])) for line in lines]
            for ranking in rankings
        }
        wanted = sorted(set(chain(*at.values())))
        chosen, self._order = self._order[:problems], self._order[problems:]
        self._order += chosen  # a small curriculum is gone through again
        asked = [(problem, allocation) for problem in chosen for allocation in wanted]
        given = self._judge(
            [problem for problem, _ in asked], [one for _, one in asked], self._seed
        )
        self.answers += len(asked)
        rewards = {one: given[index :: len(wanted)] for index, one in enumerate(wanted)}
        return {
            ranking: [
                fmean(row) for row in zip(*(rewards[one] for one in allocations), strict=True)
            ]
            for ranking, allocations in at.items()
        }


def _means(rewards: dict[Ranking, list[float]]) -> dict[Ranking, float]:
    return {ranking: fmean(row) for ranking, row in rewards.items()}


def _exchanged(ranking: Ranking, out: Head, into: Head) -> Ranking:
    """`ranking` with two heads in each other's place."""
    other = {out: into, into: out}
    return tuple(other.get(head, head) for head in ranking)


def _allocation(ranking: Ranking, streaming: frozenset[Head]) -> Allocation:
    layers = 1 + max(layer for layer, _ in ranking)
    full = sorted(set(ranking) - streaming)
    return tuple(tuple(head for at, head in full if at == layer) for layer in range(layers))


def _is_settled(row: dict[str, Any]) -> bool:
    """Whether a round made no exchange."""
    return row["step"] > 0 and not any(change["exchange"] for change in row["changes"].values())


def _read(log: Path, made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """Rounds that were done, the start as step 0 first."""
    rows: list[dict[str, Any]] = []
    if log.exists():
        rows = list(step_rows(log.read_text(encoding="utf-8"))[0].values())
    if not rows:
        return [{"step": 0, "ranking": made_with["start"], "elapsed": 0.0, "made_with": made_with}]
    if rows[0].get("made_with") != made_with:
        raise RlkvError(
            f"{log}: made with other settings of refine, another seed or other gates to start "
            "from: delete it to begin the refinement again, or choose another --output"
        )
    return rows
