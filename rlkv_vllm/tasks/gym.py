"""Problems of reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks.checker import CHECKER
from rlkv_vllm.tasks.grading import bare, final_answer
from rlkv_vllm.tasks.task import SOLVED, Problem

PREFIX = "gym:"

#: How to answer. Grids and sets contain line breaks and braces, so tags mark their ends.
INSTRUCTION = (
    "Give your final answer between <answer> and </answer>, exactly in the form that is asked "
    "for, with nothing else between the tags."
)


class GymTask:
    """One of reasoning-gym's tasks in its default difficulty, with its own scorer.

    An `RlkvError` if there is no such task, it needs options, or reasoning-gym is not installed.
    """

    def __init__(self, name: str) -> None:
        if find_spec("reasoning_gym") is None:
            raise RlkvError(
                f"task {PREFIX}{one_line(name)}: reasoning-gym is not installed: run "
                "`pip install 'rlkv-vllm[gym]'`"
            )
        self._gym_name = name
        self.name = PREFIX + name
        self._entries(1, 0)

    def problems(self, n: int, seed: int) -> list[Problem]:
        """`n` problems; `extra` holds the entry that the scorer needs."""
        return [
            Problem(
                [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}],
                "" if entry["answer"] is None else str(entry["answer"]),
                {"entry": entry},
            )
            for entry in (self._entries(n, seed) if n else [])
        ]

    def score(self, text: str, problem: Problem) -> float:
        """The score that reasoning-gym gives the final answer, 0 if its scorer fails."""
        given = final_answer(text)
        if given is None:
            return 0.0
        entry = problem.extra["entry"]
        score = 0.0
        # First unchanged, then without the marks that models put around answers.
        for answer in dict.fromkeys((given.strip(), bare(given))):
            request = {"check": "gym", "name": self._gym_name, "entry": entry, "answer": answer}
            score = max(score, CHECKER.score(request))
            if score >= SOLVED:
                break
        return score

    def _entries(self, n: int, seed: int) -> list[dict[str, Any]]:
        # reasoning-gym makes problem i of seed s from s + i: without the hash, seeds s and s + 1
        # would share all problems but one.
        digest = hashlib.sha256(f"{self._gym_name}-{seed}".encode()).digest()
        spread = int.from_bytes(digest[:4], "big") // 2
        request = {"check": "gym-problems", "name": self._gym_name, "n": n, "seed": spread}
        reply = CHECKER.ask(request)
        if reply is None:
            raise RlkvError(f"task {self.name}: its problems do not fit into memory: ask for fewer")
        if "unknown" in reply:
            alike = ", ".join(PREFIX + name for name in reply["unknown"])
            fix = f"did you mean {alike}?" if alike else "see reasoning-gym's gallery for names"
            raise RlkvError(f"task {one_line(self.name)}: unknown to reasoning-gym: {fix}")
        entries: list[dict[str, Any]] = reply["entries"]
        return entries
