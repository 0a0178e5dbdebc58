"""What the making of a profile cost, in a file beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object
from rlkv_vllm.machine import cpu_seconds
from rlkv_vllm.store import Store

FORMAT = "rlkv compare cost 1"
#: Seconds between two notes of the cost of work, which an interruption loses.
_PAUSE = 10.0


@dataclass(frozen=True)
class Cost:
    """CPU seconds of all processes and wall seconds; None: not known."""

    cpu_seconds: float | None = None
    seconds: float | None = None


def cost_file(profile: Path) -> Path:
    """Where the cost of a profile is noted: PROFILE.cost.json for PROFILE.json."""
    return profile.with_name(profile.name.removesuffix(".json") + ".cost.json")


def read_cost(profile: Path) -> Cost:
    """The cost noted beside a profile, if any.

    Raises:
        RlkvError: the file holds no JSON object, or a value is no number.
    """
    path = cost_file(profile)
    if not path.exists():
        return Cost()
    content = read_json_object(path)
    for name in ("cpu_seconds", "seconds"):
        value = content.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RlkvError(
                f"{one_line(path)}: {name} {one_line(repr(value), 40)}: must be a number of "
                "seconds: correct it, or delete the file"
            )
    return Cost(content.get("cpu_seconds"), content.get("seconds"))


class Meter:
    """Measures and notes what a profile costs, from now on.

    `store` is the file that takes the cost, guarded by the settings of the profile. What it holds
    of interrupted attempts is added, as their work goes on.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        before = {} if store.content.get("is_finished") else store.content
        self._cpu = before.get("cpu_seconds", 0.0) - cpu_seconds()
        self._wall = before.get("seconds", 0.0) - time.monotonic()
        self._noted = time.monotonic()

    def tick(self) -> None:
        """To be called often: notes the cost so far now and then."""
        if time.monotonic() - self._noted > _PAUSE:
            self.note()

    def note(self, **more: Any) -> None:
        """Write the cost so far, and `more` facts."""
        self._noted = time.monotonic()
        self._store.content |= {
            "cpu_seconds": round(self._cpu + cpu_seconds(), 2),
            "seconds": round(self._wall + self._noted, 2),
            **more,
        }
        self._store.save()
