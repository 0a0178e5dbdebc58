"""The task families of the models that the package has or can train itself."""

from __future__ import annotations

from rlkv_vllm.models import MODEL_NAME
from rlkv_vllm.tasks.grading import is_correct
from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES, make_problems
from rlkv_vllm.tasks.task import Problem

#: The first one is all families of the embedded model in turn.
NAMES = (MODEL_NAME, *FAMILIES, *LONG_FAMILIES)


class TestbedTask:
    """The task of one of `NAMES`."""

    __test__ = False  # not a test class, in spite of its name

    def __init__(self, name: str) -> None:
        self.name = name

    def problems(self, n: int, seed: int) -> list[Problem]:
        """New problems, none of which the models were trained on."""
        family = None if self.name == MODEL_NAME else self.name
        return [
            Problem([{"role": "user", "content": problem.prompt}], problem.answer)
            for problem in make_problems(family, n, seed)
        ]

    def score(self, text: str, problem: Problem) -> float:
        """1 for a correct final answer, else 0."""
        return float(is_correct(text, problem.answer))
