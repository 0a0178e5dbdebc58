"""Search for the full heads that serve best, at several sparsities that share one ranking.

The ranking given is taken to be a good one; what can be better is near it.

1. Neighbours: at a sparsity two heads have changed places, ordered by cross-entropy
   (`best_neighbours`). The allocations of the sparsities stay nested, as one ranking makes them.
2. Race: the first ones solve an eighth of the problems, the best half of them a quarter, the best
   half of those half, the last one all (successive halving, Jamieson and Talwalkar 2016,
   https://arxiv.org/abs/1502.07943). The ranking they are around takes part in every round; who
   solves fewer problems than it is out.
3. The last one left wins if it solves more, significantly. Then its neighbours race, `RACES` races
   in all.

Heads in question are those within `margin` of the number of streaming heads of a sparsity in the
ranking; others stay on their side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.search.answers import Answers
from rlkv_vllm.search.neighbours import Nested, best_neighbours
from rlkv_vllm.statistics import sign_test_p

#: One in so many problems, in the rounds of a race.
ROUNDS = (8, 4, 2, 1)
#: How often neighbours race, at most.
RACES = 3


def search(
    answers: Answers,
    loss: Callable[[Streaming], float],
    ranking: Sequence[Head],
    counts: Sequence[int],
    *,
    margin: int,
    candidates: int,
    problems: int,
    level: float,
) -> Nested:
    """The nested allocations that solve most; those of `ranking` if none is better.

    The `ranking` has all heads, the first one to stream in front. `counts` are numbers of
    streaming heads, ascending, above 0 and below all heads. `level` is the p-value up to which a
    gain counts.
    """
    heads = heads_in_question(ranking, counts, margin)
    best = nested_of(ranking, counts)
    for _ in range(RACES):
        near = best_neighbours(loss, best, heads, candidates)
        winner = _race(answers, best, near, problems)
        if winner == best or gain_p(answers, winner, best, 0, problems) > level:
            break
        best = winner
    return best


def most_answers(counts: int, candidates: int, problems: int) -> int:
    """How many answers `search` asks for at most, `counts` being the number of sparsities."""
    race = asked = 0
    for part in ROUNDS:
        now = _of(problems, part)
        race += candidates * (now - asked)
        asked, candidates = now, max(1, candidates // 2)
    return counts * (problems + RACES * race)


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


def gain_p(answers: Answers, new: Nested, old: Nested, first: int, last: int) -> float:
    """p-value of `new` being no better than `old`, by the problems ``first:last`` (sign test)."""

    def shares(nested: Nested) -> list[float]:
        """Per problem, of the allocations."""
        rows = (answers.solved(streaming, first, last) for streaming in nested)
        return [fmean(row) for row in zip(*rows, strict=True)]

    return sign_test_p(shares(new), shares(old))


def _race(answers: Answers, leader: Nested, near: Sequence[Nested], problems: int) -> Nested:
    """The one of `near` that is left at the end and solves more than `leader`, or `leader`."""
    left = [*near]
    for part in ROUNDS:
        if not left:
            return leader
        runners, half = [leader, *left], max(1, len(left) // 2)
        solved = answers.ask({one for nested in runners for one in nested}, _of(problems, part))
        share = {nested: fmean(solved[one] for one in nested) for nested in runners}
        left = [nested for nested in left if share[nested] >= share[leader]]
        left = sorted(left, key=lambda nested: -share[nested])[:half]
    return max([leader, *left], key=lambda nested: share[nested])


def _of(problems: int, part: int) -> int:
    """One in `part` of the problems, one at least."""
    return max(1, problems // part)
