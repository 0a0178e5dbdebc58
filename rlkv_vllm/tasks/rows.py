"""From rows with columns to problems: what files and data sets have in common."""

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

#: Names under which a reward gets the rest; columns called so are not passed on.
REWARD_ARGUMENTS = ("completion", "answer", "messages")


@dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        prompt: where the questions are: texts, or lists of chat messages.
        answer: where the answers are: texts or numbers.
        with_others: whether problems carry the other columns along, for a reward.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    with_others: bool = False

    def require(self, where: str, has: Iterable[str]) -> None:
        """Refuse rows without them.

        Raises:
            RlkvError: naming the columns that there are.
        """
        has = list(has)
        missing = [column for column in (self.prompt, self.answer) if column not in has]
        if missing:
            raise RlkvError(
                f"{where}: no column {' and '.join(map(one_line, missing))} (it has: "
                f"{', '.join(map(one_line, has)) or 'none'}): add it, or set prompt_column or "
                "answer_column"
            )

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row.

        Raises:
            UnusablePrompt: if it asks nothing.
            UnusableAnswer: if there is no answer to compare with.
        """
        others = (
            {
                name: value
                for name, value in row.items()
                if name not in (self.prompt, self.answer, *REWARD_ARGUMENTS) and _is_json(value)
            }
            if self.with_others
            else {}
        )
        return Problem(_messages(row[self.prompt]), _answer(row[self.answer]), others)


class UnusablePrompt(ValueError):
    """A prompt that is no question."""


class UnusableAnswer(ValueError):
    """An answer that nothing can be compared with."""


class RowsTask:
    """Problems sampled from rows, checked as `is_equivalent` does.

    Args:
        name: what reports call it.
        where: what messages call it.
        count: number of usable rows.
        problem: the problem of a usable row, by its index.
        skipped: number of rows that cannot be used.
        skip_reason: why the first of them cannot.

    Raises:
        RlkvError: if no row can be used.
    """

    def __init__(
        self,
        name: str,
        where: str,
        count: int,
        problem: Callable[[int], Problem],
        *,
        skipped: int = 0,
        skip_reason: str = "",
    ) -> None:
        if not count:
            why = f" (rows skipped: {skipped}, the first one: {skip_reason})" if skipped else ""
            raise RlkvError(f"{where}: holds no problem{why}: give rows with prompt and answer")
        self.name = name
        self.skipped = skipped
        self.skip_reason = skip_reason
        self._where = where
        self._count = count
        self._problem = problem

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` different rows in random order.

        Raises:
            RlkvError: if there are fewer.
        """
        if n > self._count:
            raise RlkvError(
                f"{self._where}: holds {self._count} problems, {n} are wanted: ask for at most "
                f"{self._count}"
            )
        return [self._problem(i) for i in random.Random(seed).sample(range(self._count), n)]

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
    """Whether it is one that can be encoded: JSON may hold half a character."""
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
