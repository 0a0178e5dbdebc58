"""Problem and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

#: A problem is solved from this score on.
SOLVED = 0.999


@dataclass(frozen=True)
class Problem:
    """A question in chat form and its final answer.

    Attributes:
        messages: role and content of each chat message.
        answer: the final answer.
        extra: what the scoring of its task needs besides, fit for JSON; not compared.
    """

    messages: list[dict[str, str]]
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)


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


def skip_note(task: Task) -> str | None:
    """A note for the user about rows that `task` cannot use.

    Tasks that read rows count them in `skipped` and keep the first `skip_reason`.

    Returns:
        One line, or None if no row was skipped.
    """
    skipped = getattr(task, "skipped", 0)
    if not skipped:
        return None
    rows = "1 row" if skipped == 1 else f"{skipped} rows"
    return f"task {task.name}: {rows} skipped, the first one: {getattr(task, 'skip_reason', '')}"
