"""The task families of the embedded reasoner and of the models with long answers."""

from __future__ import annotations

from rlkv_vllm.models import MODEL_NAME
from rlkv_vllm.tasks.grading import is_correct
from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES, make_problems
from rlkv_vllm.tasks.task import Problem

#: Names of the tasks here; the first one is all families of the shipped model in turn.
NAMES = (MODEL_NAME, *FAMILIES, *LONG_FAMILIES)


class TestbedTask:
    """One task family of the testbed, or all of the shipped model in turn.

    Args:
        name: one of `NAMES`.
    """

    __test__ = False  # not a test class, in spite of its name

    def __init__(self, name: str) -> None:
        self.name = name

    def problems(self, n: int, seed: int) -> list[Problem]:
        """Fresh problems; none of them was trained on."""
        family = None if self.name == MODEL_NAME else self.name
        return [
            Problem([{"role": "user", "content": problem.prompt}], problem.answer)
            for problem in make_problems(family, n, seed)
        ]

    def score(self, text: str, problem: Problem) -> float:
        """1 for a correct final answer, else 0."""
        return float(is_correct(text, problem.answer))
