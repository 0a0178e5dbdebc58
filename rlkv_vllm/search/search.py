"""Search for the full heads that serve best, at several sparsities that share one ranking.

An allocation is judged by answers that the model writes with it, and by nothing else. There are
too many allocations to try; what makes the search work is that the cost of streaming a set of
heads can be told from its pairs. One head at a time does not show that two heads do the same
work, of which one is needed; their pair does.

1. Every head in question streams alone. A head that costs more than `NEEDED` that way is in no
   pair: its pairs count as the sum of both heads.
2. Every pair of the others streams.
3. Allocations of a chain are nested, as one ranking makes them: one per sparsity, lowest first.
   The chains whose pairs lose least (`_Pairs.loss`) race: all solve a sixteenth of the problems,
   the best ones a quarter, the best of those all (successive halving, Jamieson and Talwalkar 2016,
   https://arxiv.org/abs/1502.07943).
4. So do the chains around the best one, in which two heads have changed places, needed or not;
   again around the next best one, `EXCHANGES` times at most.

What a round of a race may cost is counted in allocations, not in chains: chains share them, and all
chains of the allocations that were paid for take part. Heads in question are those within `reach`
of a sparsity's place in the ranking; others stay on their side. Everything is judged on top of
those that always stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import read_json_object, write_text_atomic

Head = tuple[int, int]
#: The streaming heads of an allocation, sorted.
Streaming = tuple[Head, ...]
#: Allocations for one sparsity after the other, the lowest first; each holds those before it.
Chain = tuple[Streaming, ...]
#: Gets problems, the streaming heads for each, and a seed; says which are solved.
Judge = Callable[[Sequence[int], Sequence[Streaming], int], Sequence[bool]]

#: What a head may cost that is tried in pairs.
NEEDED = 0.1
#: Of the problems: what a head alone and a pair are tried on, and the rounds of a race.
SINGLE, PAIR, RUNGS = 8, 16, (16, 4, 1)
#: Of the allocations of a round one in so many is in the next.
SURVIVORS, FEWEST = 6, 4
#: How often the chains around the best one race, at most.
EXCHANGES = 4
#: Sets of heads kept while chains are made from pairs, per candidate.
BEAM = 32


class Answers:
    """Who solved which problems: the first ones of a list, as many as were asked for so far.

    Answers are asked for in an order that nothing but the questions decides, so that a killed
    search goes on as it would have without.

    Args:
        judge: answers.
        path: keeps the answers.
        chunk: how many are asked for before they are written.
        made_with: what decides the answers; a file with other ones is refused.
        seed: of the judge.
        writes: whether this process keeps the file.
        report: called with the number of answers so far.

    Attributes:
        count: how many there are.
    """

    def __init__(
        self,
        judge: Judge,
        path: Path,
        chunk: int,
        made_with: dict[str, Any],
        *,
        seed: int = 0,
        writes: bool = True,
        report: Callable[[int], None] = lambda answers: None,
    ) -> None:
        self._judge, self._path, self._chunk, self._seed = judge, path, chunk, seed
        self._writes, self._report = writes, report
        self._made_with = json.loads(json.dumps(made_with))
        found = {"made_with": self._made_with, "solved": {}}
        if path.exists():
            found = read_json_object(path)
        if found.get("made_with") != self._made_with:
            raise RlkvError(
                f"{path}: answers of another model, with other settings, another seed or another "
                "start: delete it to begin the search again, or choose another --output"
            )
        self._solved: dict[str, str] = found["solved"]
        self.count = sum(map(len, self._solved.values()))

    def ask(self, wanted: Iterable[Streaming], problems: int) -> dict[Streaming, float]:
        """The share of the first `problems` problems that is solved with each allocation."""
        every = sorted(set(wanted))
        asked = [
            (streaming, problem)
            for streaming in every
            for problem in range(len(self._solved.get(_name(streaming), "")), problems)
        ]
        for start in range(0, len(asked), self._chunk):
            part = asked[start : start + self._chunk]
            solved = self._judge(
                [problem for _, problem in part],
                [streaming for streaming, _ in part],
                self._seed + self.count,
            )
            for (streaming, _), right in zip(part, solved, strict=True):
                name = _name(streaming)
                self._solved[name] = self._solved.get(name, "") + "01"[right]
            self.count += len(part)
            self.keep()
            self._report(self.count)
        return {one: fmean(self.solved(one, 0, problems)) for one in every}

    def solved(self, streaming: Streaming, first: int, last: int) -> list[bool]:
        """Which of the problems ``first:last``, all asked for before, are solved."""
        return [bit == "1" for bit in self._solved[_name(streaming)][first:last]]

    def keep(self, result: dict[str, Any] | None = None) -> None:
        """Write the file, with what came out if that is known."""
        if self._writes:
            kept = {"made_with": self._made_with, "solved": self._solved}
            if result is not None:
                kept = {"result": result, **kept}
            write_text_atomic(self._path, json.dumps(kept, indent=0) + "\n")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        needed: heads that cost too much alone.
        finalists: chains with their share of all problems, a mean over the sparsities; best first.
    """

    needed: list[Head]
    finalists: dict[Chain, float]

    @property
    def best(self) -> Chain:
        """The best chain; of equal ones the known one."""
        return next(iter(self.finalists))


def search(
    answers: Answers,
    ranking: Sequence[Head],
    lines: Sequence[int],
    *,
    reach: int,
    candidates: int,
    problems: int,
    known: Sequence[Chain] = (),
) -> Found:
    """The best chain.

    Args:
        answers: of the model.
        ranking: all heads, the one that becomes a streaming head first at the front; decides
            which heads are in question, and among equal allocations.
        lines: numbers of streaming heads, ascending, above 0 and below all heads.
        reach: heads in question on either side of each line, at least 1.
        candidates: allocations per line in the first round of a race.
        problems: that the finalists solve.
        known: chains that take part in every round of the first race.
    """
    asked = _in_question(ranking, lines, reach)
    always = [tuple(head for head in ranking[:line] if head not in set(asked)) for line in lines]
    pairs = _Pairs(answers, asked, always[0], problems)
    sizes = [line - len(heads) for line, heads in zip(lines, always, strict=True)]
    chains = [
        tuple(tuple(sorted({*heads, *more})) for heads, more in zip(always, chain, strict=True))
        for chain in pairs.chains(sizes, BEAM * candidates)
    ]
    best = _race(answers, chains, candidates, problems, known)
    for _ in range(EXCHANGES):
        leader = next(iter(best))
        near = sorted(_exchanged(leader, asked), key=pairs.loss)
        best |= _race(answers, near, candidates, problems, [leader])
        best = dict(sorted(best.items(), key=lambda item: -item[1]))
        if next(iter(best)) == leader:
            break
    return Found(pairs.needed, best)


def most_answers(heads: int, lines: int, candidates: int, problems: int) -> int:
    """How many answers `search` asks for, at most, with so many heads and one known chain."""
    race = asked = 0
    for rung, part in enumerate(RUNGS):
        now = _of(problems, part)
        race += lines * _left(candidates, rung) * (now - asked)
        asked = now
    pairs = heads * (heads - 1) // 2
    alone = (heads + 1) * _of(problems, SINGLE) + pairs * _of(problems, PAIR)
    return alone + (1 + EXCHANGES) * race + lines * problems


def num_in_question(heads: int, lines: Sequence[int], reach: int) -> int:
    """How many heads are within `reach` of one of `lines`."""
    return len(_in_question([(0, head) for head in range(heads)], lines, reach))


def chain_of(ranking: Sequence[Head], lines: Sequence[int]) -> Chain:
    """The allocations that a ranking makes."""
    return tuple(tuple(sorted(ranking[:line])) for line in lines)


def full_heads(streaming: Streaming, layers: int, kv_heads: int) -> list[list[int]]:
    """Full heads per layer."""
    return [[j for j in range(kv_heads) if (i, j) not in streaming] for i in range(layers)]


class _Pairs:
    """What streaming costs, as far as heads alone and pairs of heads tell.

    Attributes:
        needed: heads that cost too much alone.
    """

    def __init__(
        self, answers: Answers, heads: Sequence[Head], always: Streaming, problems: int
    ) -> None:
        self._heads = heads
        singles, shared = _of(problems, SINGLE), _of(problems, PAIR)

        def with_always(*more: Head) -> Streaming:
            return tuple(sorted({*always, *more}))

        alone = answers.ask([with_always(), *map(with_always, heads)], singles)
        least = alone[with_always()] - NEEDED
        self.needed = [head for head in heads if alone[with_always(head)] < least]
        free = [head for head in heads if head not in self.needed]
        tried = answers.ask([with_always(*pair) for pair in combinations(free, 2)], shared)
        lost = {head: _loss(alone[with_always(head)], singles) for head in heads}
        none = _loss(alone[with_always()], singles)
        self._loss: dict[Head, dict[Head, float]] = {head: {} for head in heads}
        for first, second in combinations(heads, 2):
            share = tried.get(with_always(first, second))
            loss = lost[first] + lost[second] - none if share is None else _loss(share, shared)
            self._loss[first][second] = self._loss[second][first] = loss

    def loss(self, chain: Chain) -> float:
        """Sum over the allocations of the loss of all pairs; each head counts once in it."""
        total = 0.0
        for streaming in chain:
            heads = [head for head in streaming if head in self._loss]
            pairs = sum(self._loss[first][second] for first, second in combinations(heads, 2))
            total += pairs / max(1, len(heads) - 1)
        return total

    def chains(self, sizes: Sequence[int], width: int) -> list[Chain]:
        """Chains with so many of the heads, those of least loss first: a beam search.

        Of equal ones those come first whose heads stand further in front.
        """
        # The allocations that are finished, and the one that grows, as places of heads; the loss
        # of the finished ones, that of all pairs of the growing one.
        beam: list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...], float, float]]
        beam = [((), (), 0.0, 0.0)]
        places = range(len(self._heads))
        loss = [[self._loss[a].get(b, 0.0) for b in self._heads] for a in self._heads]
        for size in range(1, sizes[-1] + 1):
            grown = {}
            for done, heads, before, pairs in beam:
                for new in places:
                    key = (done, tuple(sorted((*heads, new))))
                    if new not in heads and key not in grown:
                        grown[key] = (before, pairs + sum(loss[new][head] for head in heads))
            # Sums in another order differ in their last digits.
            ranked = nsmallest(
                width,
                (
                    (round(before + pairs / max(1, size - 1), 9), sum(heads), done, heads, before)
                    for (done, heads), (before, pairs) in grown.items()
                ),
            )
            beam = [
                ((*done, heads), heads, total, grown[done, heads][1])
                if size in sizes
                else (done, heads, before, grown[done, heads][1])
                for total, _, done, heads, before in ranked
            ]
        return [
            tuple(tuple(self._heads[place] for place in heads) for heads in done)
            for done, *_ in beam
        ]


def _race(
    answers: Answers,
    chains: Sequence[Chain],
    candidates: int,
    problems: int,
    known: Sequence[Chain],
) -> dict[Chain, float]:
    """The finalists, best first, with their share of all problems; of equal ones the earlier."""
    left, shares = list(chains), dict.fromkeys(known, 0.0)
    for rung, part in enumerate(RUNGS):
        left = _paid_for(left, known, _left(candidates, rung))
        solved = answers.ask({one for chain in left for one in chain}, _of(problems, part))
        shares = {chain: fmean(solved[one] for one in chain) for chain in left}
        left.sort(key=lambda chain: -shares[chain])
    return {chain: shares[chain] for chain in left}


def _paid_for(chains: Sequence[Chain], known: Sequence[Chain], per_line: int) -> list[Chain]:
    """`known`, and those of `chains` that do with so many more allocations per line, in order.

    Later ones that need no further allocation are among them.
    """
    free = {one for chain in known for one in chain}
    paid: list[set[Streaming]] = [set() for _ in chains[0]] if chains else []
    kept = dict.fromkeys(known)
    for chain in chains:
        more = [have | ({one} - free) for have, one in zip(paid, chain, strict=True)]
        if all(len(have) <= per_line for have in more):
            paid = more
            kept[chain] = None
    return list(kept)


def _exchanged(chain: Chain, heads: Sequence[Head]) -> list[Chain]:
    """All chains in which two of `heads` have changed places."""
    found = []
    for pair in combinations(heads, 2):
        other = tuple(
            tuple(sorted({*one} ^ {*pair})) if (pair[0] in one) != (pair[1] in one) else one
            for one in chain
        )
        if other != chain:
            found.append(other)
    return found


def _in_question(ranking: Sequence[Head], lines: Sequence[int], reach: int) -> list[Head]:
    return [
        head
        for place, head in enumerate(ranking)
        if any(line - reach <= place < line + reach for line in lines)
    ]


def _of(problems: int, part: int) -> int:
    """That part of the problems, one at least."""
    return max(1, problems // part)


def _left(candidates: int, rung: int) -> int:
    """Allocations per line in a round of a race."""
    return min(candidates, max(FEWEST, candidates // SURVIVORS**rung))


def _loss(share: float, problems: int) -> float:
    return -math.log(max(share, 0.5 / problems))  # none is impossible


def _name(streaming: Streaming) -> str:
    return " ".join(f"{layer}.{head}" for layer, head in streaming)
