"""Which problems a profile was made from: they say nothing about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.tasks import Problem, Task


def seen_problems(profile: HeadProfile, task: Task, problems: Sequence[Problem]) -> list[int]:
    """Places of those of `problems` that the profile's provenance names.

    That of `rlkv score`, `rlkv train` and `rlkv refine` names them; of other profiles nothing is
    known, and the list is empty.
    """
    made = profile.provenance
    used = {
        _key(problem)
        for n, seed in _drawn({"seed": made.seed, **made.config}, task.name)
        for problem in task.problems(n, seed)
    }
    return [place for place, problem in enumerate(problems) if _key(problem) in used]


def _drawn(config: Mapping[str, Any], task: str) -> Iterator[tuple[int, int]]:
    """Number and seed of the problems of `task` that a job and those before it asked for."""
    name, curriculum, start = (config.get(key) for key in ("task", "curriculum", "start"))
    name = name.get("name") if isinstance(name, dict) else name
    # In this order: `rlkv refine`, `rlkv score`, `rlkv train`.
    inner = curriculum.get("problems") if isinstance(curriculum, dict) else None
    n = config.get("tried", config.get("n", inner))
    seed = config.get("seed")
    if name == task and type(n) is int and type(seed) is int:
        yield n, seed
    before = start.get("config") if isinstance(start, dict) else None
    if isinstance(before, dict):
        yield from _drawn(before, task)


def _key(problem: Problem) -> str:
    return json.dumps([problem.messages, problem.answer])
