"""Tasks to measure a model on: problems with a final answer that can be checked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Protocol

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import one_line
from rlkv_vllm.testbed import MODEL_NAME
from rlkv_vllm.testbed.problems import END_THINK, FAMILIES, THINK, make_problems


@dataclass(frozen=True)
class Problem:
    """A question in chat form and its final answer."""

    messages: list[dict[str, str]]
    answer: str


class Task(Protocol):
    """Where problems come from and what counts as solving one."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` problems, the same ones for the same arguments."""

    def check(self, text: str, answer: str) -> bool:
        """Whether the output `text`, chain of thought included, ends in `answer`."""


class TestbedTask:
    """One task family of the embedded reasoner, or all of them in turn.

    Args:
        family: one of `FAMILIES`, or None for all.
    """

    __test__ = False  # no test class, whatever pytest thinks of its name

    def __init__(self, family: str | None) -> None:
        self._family = family
        self.name = family or MODEL_NAME

    def problems(self, n: int, seed: int) -> list[Problem]:
        """Fresh problems; none of them was trained on."""
        return [
            Problem([{"role": "user", "content": problem.prompt}], problem.answer)
            for problem in make_problems(self._family, n, seed)
        ]

    def check(self, text: str, answer: str) -> bool:
        """As `is_correct`."""
        return is_correct(text, answer)


class FileTask:
    """Problems of a JSON-lines file.

    Every line is an object with `prompt`, a text or a list of chat messages, and `answer`, a
    text or a number. Other columns are ignored.

    Args:
        path: the file.

    Raises:
        RlkvError: if it is missing, empty, or holds a bad line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.stem
        self._all = list(_read_problems(path))
        if not self._all:
            raise RlkvError(f"{path}: holds no problem: give one JSON object per line")

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` lines in random order.

        Raises:
            RlkvError: if the file has fewer.
        """
        if n > len(self._all):
            raise RlkvError(
                f"{self._path}: holds {len(self._all)} problems, {n} are wanted: ask for at most "
                f"{len(self._all)}"
            )
        return random.Random(seed).sample(self._all, n)

    def check(self, text: str, answer: str) -> bool:
        """As `is_correct`."""
        return is_correct(text, answer)


def get_task(name: str) -> Task:
    """The task of that name.

    Args:
        name: a task family of the embedded reasoner, "embedded" for all of them, or the path of
            a `.jsonl` file.

    Raises:
        RlkvError: if there is no such task, or the file is bad.
    """
    if name == MODEL_NAME:
        return TestbedTask(None)
    if name in FAMILIES:
        return TestbedTask(name)
    if name.endswith(".jsonl") or Path(name).is_file():
        return FileTask(Path(name))
    raise RlkvError(
        f"task {one_line(name)}: unknown, choose one of {', '.join((MODEL_NAME, *FAMILIES))}, or "
        "give the path of a .jsonl file with prompt and answer"
    )


# --- answers ---------------------------------------------------------------------------


def is_correct(text: str, answer: str) -> bool:
    """Whether the final answer of `text` is `answer`, as a number or literally."""
    given = final_answer(text)
    return given is not None and _normalized(given) == _normalized(answer)


def final_answer(text: str) -> str | None:
    r"""The final answer of an output.

    That is, after the chain of thought: what the last `\boxed{}` holds, else what follows the
    last "answer" on its line, else the last line.

    Returns:
        None if the chain of thought has no end or nothing follows it.
    """
    _, ended, said = text.rpartition(END_THINK)
    if not ended and THINK in text:
        return None
    boxed = _last_boxed(said)
    if boxed is not None:
        return boxed
    answers = re.findall(r"\banswer\b(?:\s+is\b)?[\s:=*]*([^\n]*)", said, re.IGNORECASE)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    candidates = [found for found in answers if found.strip()] or lines
    return candidates[-1] if candidates else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _normalized(answer: str) -> str | Decimal:
    plain = " ".join(answer.split()).strip("$*`\"' ").rstrip(".").strip("$*`\"' ").lower()
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return plain
    return number if number.is_finite() else plain


# --- files -----------------------------------------------------------------------------


def _read_problems(path: Path) -> Iterator[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise RlkvError(f"{path}: no such file: check the path of the task") from error
    except UnicodeDecodeError as error:
        raise RlkvError(f"{path}: not UTF-8 text (byte {error.start}): give JSON lines") from error
    except OSError as error:
        raise RlkvError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _problem(f"{path}, line {number}", line)


def _problem(where: str, line: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RlkvError(
            f"{where}: not valid JSON ({one_line(error)}): give one object per line"
        ) from error
    if not isinstance(row, dict):
        raise RlkvError(f"{where}: holds a JSON {type(row).__name__}, expected an object")
    missing = [column for column in ("prompt", "answer") if column not in row]
    if missing:
        has = ", ".join(map(one_line, row)) or "none"
        raise RlkvError(f"{where}: no column {' and '.join(missing)} (it has: {has}): add it")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise RlkvError(f"{where}: answer {one_line(repr(answer), 60)}: give a text or a number")
    return Problem(_messages(where, row["prompt"]), str(answer))


def _messages(where: str, prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(_is_message(item) for item in prompt):
        return [{"role": item["role"], "content": item["content"]} for item in prompt]
    raise RlkvError(
        f"{where}: prompt {one_line(repr(prompt), 60)}: give a text, or a list of chat messages "
        "with role and content"
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )
