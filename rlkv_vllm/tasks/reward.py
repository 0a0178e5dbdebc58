"""Scores from the user's own function."""

from __future__ import annotations

import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks.task import Problem, Task, count_problems


class RewardedTask:
    """Problems of another task, scored by a function.

    The function is called as `function(completion=..., answer=..., messages=..., **extra)` and
    returns a number in [0, 1], or a bool. `path` is `package.module:function` or
    `package.module.function`; modules in the current folder are found.

    Raises:
        RlkvError: there is no such function or it does not take these arguments.
    """

    def __init__(self, task: Task, path: str) -> None:
        self.name = task.name
        self.problems = task.problems
        self.skipped: list[str] = getattr(task, "skipped", [])
        self.count = count_problems(task)
        self._path = one_line(path)
        self._function = _find(path)
        self._check_signature()

    def score(self, text: str, problem: Problem) -> float:
        """What the function returns; an `RlkvError` if it fails or that is no number in [0, 1]."""
        try:
            value = self._function(
                completion=text,
                answer=problem.answer,
                messages=[dict(message) for message in problem.messages],
                **problem.extra,
            )
        except Exception as error:
            raise RlkvError(
                f"reward {self._path}: raised {type(error).__name__} ({one_line(error)}) on "
                f"problem {_start(problem)}: fix the function, or let it return 0 there"
            ) from error
        number = _number(value)
        if not 0 <= number <= 1:
            raise RlkvError(
                f"reward {self._path}: returned {one_line(repr(value), 60)} on problem "
                f"{_start(problem)}: return a number in [0, 1] or a bool"
            )
        return number

    def _check_signature(self) -> None:
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # some functions in C have no signature
            return
        extra = self.problems(1, 0)[0].extra
        try:
            signature.bind(completion="", answer="", messages=[], **extra)
        except TypeError as error:
            more = f" and the other columns ({', '.join(map(one_line, extra))})" if extra else ""
            raise RlkvError(
                f"reward {self._path}: does not take what it is called with ({one_line(error)}): "
                f"it gets completion, answer, messages{more} by name; write "
                "`def function(completion, answer, messages, **extra)`"
            ) from error


def _find(path: str) -> Callable[..., Any]:
    module, _, function = path.rpartition(":" if ":" in path else ".")
    if not module or not function:
        raise RlkvError(f"reward {one_line(path)}: not a function: give package.module:function")
    if os.getcwd() not in sys.path:
        # A console script does not see modules of the current folder. Last: they hide nothing.
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(f"{module}:{function}")
    except Exception as error:  # importing runs any code
        raise RlkvError(
            f"reward {one_line(path)}: cannot be imported ({type(error).__name__}: "
            f"{one_line(error)}): give package.module:function, importable from the current folder"
        ) from error
    if not callable(found):
        raise RlkvError(
            f"reward {one_line(path)}: a {type(found).__name__}, not a function: give "
            "package.module:function"
        )
    return found


def _number(value: Any) -> float:
    """`value` as a float, also from array libraries; NaN if it is no number or bool."""
    try:
        return float(value) if hasattr(value, "__float__") else math.nan
    except Exception:
        return math.nan


def _start(problem: Problem) -> str:
    return repr(one_line(problem.messages[-1]["content"], 60))
