"""The search of benchmarks/allocation_ceiling.py on answers that are known exactly."""

import random
from argparse import Namespace
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from rlkv_vllm.errors import RlkvError
from tests.scripts import load_benchmark

HEADS = [(layer, head) for layer in range(3) for head in range(4)]
NEEDED = {(0, 0), (0, 3), (1, 1)}
#: Two heads that do the same work: one of them has to stay full.
TWINS = {(1, 2), (2, 3)}
#: What the others cost; the best four to stream are the first four of these.
COST = dict(zip(sorted({*HEADS} - NEEDED - TWINS), (0, 0, 0.01, 0.3, 0.3, 0.3, 0.3), strict=True))
BEST = ((0, 1), (0, 2), (1, 0), (1, 2))
ARGS = Namespace(single_problems=32, pair_problems=16, needed=0.4, candidates=20)


@pytest.fixture(scope="module")
def ceiling() -> ModuleType:
    return load_benchmark("allocation_ceiling")


class Judge:
    """Solves a problem with a probability that the streaming heads lower."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.answers = 0
        self._dies_after = dies_after

    def __call__(
        self, candidates: list[tuple[tuple[int, int], ...]], which: list[int]
    ) -> list[bool]:
        if self.answers + len(which) > self._dies_after:
            raise KeyboardInterrupt
        self.answers += len(which)
        return [
            random.Random(f"{problem}").random() < self._share({*one})
            for one, problem in zip(candidates, which, strict=True)
        ]

    @staticmethod
    def _share(streaming: set[tuple[int, int]]) -> float:
        if streaming & NEEDED or streaming >= TWINS:
            return 0.1
        return 1 - 0.05 * len(streaming & TWINS) - sum(COST.get(head, 0) for head in streaming)


def test_the_best_allocation_is_found(ceiling: ModuleType, tmp_path: Path) -> None:
    judge = Judge()
    answers = ceiling.Answers(judge, tmp_path / "cache.json", 64, {})
    needed, best = ceiling.search(answers, HEADS, 4, [], ARGS)
    assert {*needed} == NEEDED
    assert next(iter(best)) in {BEST, (*BEST[:3], (2, 3))}
    assert best[next(iter(best))] == max(best.values())
    assert judge.answers < 256 * len([*combinations(HEADS, 4)]) / 10


def test_a_killed_search_goes_on(ceiling: ModuleType, tmp_path: Path) -> None:
    whole, first = Judge(), Judge(dies_after=1000)
    expected = ceiling.search(
        ceiling.Answers(whole, tmp_path / "whole.json", 64, {}), HEADS, 4, [], ARGS
    )
    cache = tmp_path / "killed.json"
    with pytest.raises(KeyboardInterrupt):
        ceiling.search(ceiling.Answers(first, cache, 64, {}), HEADS, 4, [], ARGS)
    second = Judge()
    assert ceiling.search(ceiling.Answers(second, cache, 64, {}), HEADS, 4, [], ARGS) == expected
    assert first.answers + second.answers == whole.answers


def test_answers_of_another_model_are_refused(ceiling: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    ceiling.Answers(Judge(), cache, 64, {"weights": "a"}).ask([()], 2)
    with pytest.raises(RlkvError, match="another model"):
        ceiling.Answers(Judge(), cache, 64, {"weights": "b"})


def test_too_many_needed_heads_are_refused(ceiling: ModuleType, tmp_path: Path) -> None:
    answers = ceiling.Answers(Judge(), tmp_path / "cache.json", 64, {})
    with pytest.raises(RlkvError, match="raise --needed"):
        ceiling.search(answers, HEADS, 10, [], ARGS)
