"""Problems from rows with columns, as files and data sets have them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks.grading import gold_answer, is_equivalent
from rlkv_vllm.tasks.task import Problem

#: Arguments of every reward; columns with these names are not passed on.
REWARD_ARGUMENTS = ("completion", "answer", "messages")


@dataclass(frozen=True)
class Columns:
    """Columns of the questions (texts or lists of chat messages) and answers (texts or numbers).

    `with_others`: whether `Problem.extra` has the other columns, for a reward.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    with_others: bool = False

    def require(self, where: str, has: Iterable[str]) -> None:
        """Raise an `RlkvError` that names the columns `has` if one is missing."""
        has = list(has)
        missing = [column for column in (self.prompt, self.answer) if column not in has]
        if missing:
            raise RlkvError(
                f"{where}: no column {' and '.join(map(one_line, missing))} (it has: "
                f"{', '.join(map(one_line, has)) or 'none'}): add it, or set prompt_column or "
                "answer_column"
            )

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row; raises `UnusablePrompt` or `UnusableAnswer`."""
        messages, answer = _messages(row[self.prompt]), _answer(row[self.answer])
        if not self.with_others:
            return Problem(messages, answer)
        known = (self.prompt, self.answer, *REWARD_ARGUMENTS)
        others = {
            name: value for name, value in row.items() if name not in known and _is_json(value)
        }
        return Problem(messages, answer, others)


class UnusablePrompt(ValueError):
    """The prompt of a row is empty, or neither text nor messages."""


class UnusableAnswer(ValueError):
    """The answer of a row is empty, or neither text nor a finite number."""


@dataclass(frozen=True)
class RowsTask:
    """Problems sampled from rows, checked as `is_equivalent` does.

    Reports call it `name`, errors `where`. `problem` makes the problem of one of `count` usable
    rows; `skipped` has a reason for each other row. An `RlkvError` if no row can be used.
    """

    name: str
    where: str
    count: int
    problem: Callable[[int], Problem]
    skipped: list[str]

    def __post_init__(self) -> None:
        if not self.count:
            why = ""
            if self.skipped:
                why = f" (rows skipped: {len(self.skipped)}, the first one: {self.skipped[0]})"
            raise RlkvError(
                f"{self.where}: holds no problem{why}: give rows with prompt and answer"
            )

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` different rows in random order; an `RlkvError` if there are fewer."""
        if n > self.count:
            raise RlkvError(
                f"{self.where}: holds {self.count} problems, {n} are wanted: ask for at most "
                f"{self.count}"
            )
        return [self.problem(i) for i in random.Random(seed).sample(range(self.count), n)]

    def score(self, text: str, problem: Problem) -> float:
        """1 for a correct final answer, else 0."""
        return float(is_equivalent(text, problem.answer))


def _messages(prompt: Any) -> list[dict[str, str]]:
    if _is_text(prompt) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return [{"role": item["role"], "content": item["content"]} for item in prompt]
    raise UnusablePrompt(
        f"prompt {one_line(repr(prompt), 60)}: give a text, or a list of chat messages with role "
        "and content"
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(_is_text(item.get(key)) for key in ("role", "content"))


def _answer(answer: Any) -> str:
    plain = ""
    if _is_text(answer):
        plain = gold_answer(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool):
        plain = str(answer)
    elif isinstance(answer, float) and math.isfinite(answer):
        # A column of whole numbers with gaps is read as one of floats.
        plain = str(int(answer)) if answer.is_integer() else str(answer)
    if not plain:
        raise UnusableAnswer(f"answer {one_line(repr(answer), 60)}: give a text or a number")
    return plain


def _is_text(value: Any) -> bool:
    """Whether `value` is text that can be encoded: JSON may hold half a surrogate pair."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
