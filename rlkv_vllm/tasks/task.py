"""Problem and task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: The lowest score of a solved problem.
SOLVED = 0.999


@dataclass(frozen=True)
class Problem:
    """A question in chat form and its final answer.

    `messages` have role and content. `extra` is what else the scoring of its task needs, fit for
    JSON; it is not compared.
    """

    messages: list[dict[str, str]]
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of questions and answers, in their order."""
    asked = [[problem.messages, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class Task(Protocol):
    """A source of problems, and the scores of answers to them."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` problems; equal arguments give equal problems."""

    def score(self, text: str, problem: Problem) -> float:
        """The score of the output `text`, chain of thought included, in [0, 1]."""


def is_solved(task: Task, text: str, problem: Problem) -> bool:
    """Whether the output `text`, chain of thought included, solves `problem`."""
    return task.score(text, problem) >= SOLVED


def count_problems(task: Task) -> int | None:
    """How many problems `task` has; None: as many as are wanted."""
    return getattr(task, "count", None)


def skip_note(task: Task) -> str | None:
    """One line about the rows that `task` cannot use, or None if there are none.

    Tasks that read rows have a list `skipped` with a reason per row.
    """
    skipped: list[str] = getattr(task, "skipped", [])
    if not skipped:
        return None
    rows = "1 row" if len(skipped) == 1 else f"{len(skipped)} rows"
    return f"task {task.name}: {rows} skipped, the first one: {skipped[0]}"
