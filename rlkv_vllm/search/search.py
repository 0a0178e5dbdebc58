"""Search for the full heads that serve best, at several sparsities that share one ranking.

Only the answers that the model writes with an allocation count. There are too many allocations to
try; the search works because the cost of a set of streaming heads can be estimated from its pairs.
One head at a time does not show that two heads do the same work, of which one is needed; their
pair does.

1. Every head in question streams alone. A head that costs more than `NEEDED` is in no pair: the
   cost of its pairs counts as the sum of both heads.
2. Every pair of the others streams.
3. The allocations of the sparsities are nested, as one ranking makes them. The nested allocations
   whose pairs lose least (`_Pairs.loss`) race: all solve a sixteenth of the problems, the best
   ones a quarter, the best of those all of them (successive halving, Jamieson and Talwalkar 2016,
   https://arxiv.org/abs/1502.07943).
4. Then those around the best one race, in which two heads have changed places, needed or not;
   again around the next best one, `EXCHANGES` times at most.

The budget of a round is a number of allocations per sparsity. Nested allocations share them, and
all that need no further allocation take part. Heads in question are those within `margin` of the
number of streaming heads of a sparsity in the ranking; others stay on their side. The heads that
stream at all sparsities do so in every question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import combinations
from statistics import fmean

from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.search.answers import Answers

#: Allocations of ascending sparsities, each with the streaming heads of those before it.
Nested = tuple[Streaming, ...]

#: Loss of accuracy up to which a head is tried in pairs.
NEEDED = 0.1
#: One in so many problems: for a head alone, for a pair, and in the rounds of a race.
SINGLE, PAIR, ROUNDS = 8, 16, (16, 4, 1)
#: One in so many allocations of a round is in the next, and how many at least.
SURVIVORS, FEWEST = 6, 4
#: How often exchanges around the best allocations race, at most.
EXCHANGES = 4
#: Sets of heads kept while nested allocations are made from pairs, per candidate.
BEAM = 32


@dataclass(frozen=True)
class Found:
    """`needed` heads cost too much alone; `finalists` come best first.

    Each with its share of all problems solved, a mean over the sparsities.
    """

    needed: list[Head]
    finalists: dict[Nested, float]

    @property
    def best(self) -> Nested:
        """The best nested allocations; of equal ones the known ones."""
        return next(iter(self.finalists))


def search(
    answers: Answers,
    ranking: Sequence[Head],
    counts: Sequence[int],
    *,
    margin: int,
    candidates: int,
    problems: int,
    known: Sequence[Nested] = (),
) -> Found:
    """Find the nested allocations that solve most.

    The `ranking` of all heads, the first one to stream in front, decides which heads are in
    question, and among equal allocations. `counts` are numbers of streaming heads, ascending,
    above 0 and below all heads. Those `known` take part in every round of the first race.
    """
    asked = heads_in_question(ranking, counts, margin)
    always = [tuple(head for head in ranking[:count] if head not in {*asked}) for count in counts]
    pairs = _Pairs(answers, asked, always[0], problems)
    sizes = [count - len(heads) for count, heads in zip(counts, always, strict=True)]
    made = [
        tuple(tuple(sorted({*heads, *more})) for heads, more in zip(always, nested, strict=True))
        for nested in pairs.least_loss(sizes, BEAM * candidates)
    ]
    best = _race(answers, made, candidates, problems, known)
    for _ in range(EXCHANGES):
        leader = next(iter(best))
        near = sorted(_exchanged(leader, asked), key=pairs.loss)
        best |= _race(answers, near, candidates, problems, [leader])
        best = dict(sorted(best.items(), key=lambda item: -item[1]))
        if next(iter(best)) == leader:
            break
    return Found(pairs.needed, best)


def most_answers(heads: int, counts: int, candidates: int, problems: int) -> int:
    """How many answers `search` asks for at most, with one known nested allocation.

    `heads` and `counts` are the numbers of heads in question and of sparsities.
    """
    race = asked = 0
    for number, part in enumerate(ROUNDS):
        now = _of(problems, part)
        race += counts * _left(candidates, number) * (now - asked)
        asked = now
    pairs = heads * (heads - 1) // 2
    alone = (heads + 1) * _of(problems, SINGLE) + pairs * _of(problems, PAIR)
    return alone + (1 + EXCHANGES) * race + counts * problems


def nested_of(ranking: Sequence[Head], counts: Sequence[int]) -> Nested:
    """The allocations that a ranking makes."""
    return tuple(tuple(sorted(ranking[:count])) for count in counts)


def heads_in_question(ranking: Sequence[Head], counts: Sequence[int], margin: int) -> list[Head]:
    """The heads within `margin` of one of `counts` in the ranking."""
    return [
        head
        for place, head in enumerate(ranking)
        if any(count - margin <= place < count + margin for count in counts)
    ]


class _Pairs:
    """What streaming costs, estimated from heads alone and pairs; `needed` cost too much alone."""

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

    def loss(self, nested: Nested) -> float:
        """Sum over the allocations of the loss of all pairs; each head counts once in it."""
        total = 0.0
        for streaming in nested:
            heads = [head for head in streaming if head in self._loss]
            pairs = sum(self._loss[first][second] for first, second in combinations(heads, 2))
            total += pairs / max(1, len(heads) - 1)
        return total

    def least_loss(self, sizes: Sequence[int], width: int) -> list[Nested]:
        """Nested allocations of these sizes, those of least loss first: a beam search.

        Of equal ones those come first whose heads stand further in front.
        """
        # The allocations that are finished, and the one that grows, as places of heads; the loss
        # of the finished ones, that of all pairs of the growing one.
        beam: list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...], float, float]]
        beam = [((), (), 0.0, 0.0)]
        loss = [[self._loss[a].get(b, 0.0) for b in self._heads] for a in self._heads]
        for size in range(1, sizes[-1] + 1):
            grown = {}
            for done, heads, before, pairs in beam:
                for new in range(len(self._heads)):
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
    contenders: Sequence[Nested],
    candidates: int,
    problems: int,
    known: Sequence[Nested],
) -> dict[Nested, float]:
    """The finalists, best first, with their share of all problems; of equal ones the earlier."""
    left, shares = list(contenders), dict.fromkeys(known, 0.0)
    for number, part in enumerate(ROUNDS):
        left = _within_budget(left, known, _left(candidates, number))
        solved = answers.ask({one for nested in left for one in nested}, _of(problems, part))
        shares = {nested: fmean(solved[one] for one in nested) for nested in left}
        left.sort(key=lambda nested: -shares[nested])
    return {nested: shares[nested] for nested in left}


def _within_budget(
    contenders: Sequence[Nested], known: Sequence[Nested], budget: int
) -> list[Nested]:
    """`known`, and the `contenders` that need at most `budget` more allocations per sparsity.

    They are taken in order; later ones that need no further allocation are among them.
    """
    free = {one for nested in known for one in nested}
    taken: list[set[Streaming]] = [set() for _ in contenders[0]] if contenders else []
    kept = dict.fromkeys(known)
    for nested in contenders:
        more = [have | ({one} - free) for have, one in zip(taken, nested, strict=True)]
        if all(len(have) <= budget for have in more):
            taken = more
            kept[nested] = None
    return list(kept)


def _exchanged(nested: Nested, heads: Sequence[Head]) -> list[Nested]:
    """All nested allocations in which two of `heads` have changed places."""
    others = (
        tuple(
            tuple(sorted({*one} ^ {*pair})) if (pair[0] in one) != (pair[1] in one) else one
            for one in nested
        )
        for pair in combinations(heads, 2)
    )
    return [other for other in others if other != nested]


def _of(problems: int, part: int) -> int:
    """One in `part` of the problems, one at least."""
    return max(1, problems // part)


def _left(candidates: int, number: int) -> int:
    """Allocations per sparsity in a round of a race."""
    return min(candidates, max(FEWEST, candidates // SURVIVORS**number))


def _loss(share: float, problems: int) -> float:
    return -math.log(max(share, 0.5 / problems))  # none is impossible
