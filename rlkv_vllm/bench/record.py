"""The results of a benchmark: written after every point, and continued by the same command."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.case import Point
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.machine import describe_machine
from rlkv_vllm.planning.roofline import Device
from rlkv_vllm.store import Store, differences

#: Until 1, the settings were those of the models.
FORMAT = "rlkv bench 2"

#: One case at one point: samples by variant, the roofline's gains, load and date.
Result = dict[str, Any]


class Record:
    """One `.json` file of results, of one machine and one set of package versions.

    Other cases, and other targets, may be added to it. `targets` are what the results of each
    model have in common, by key; `too_large` are points left out, in words, by case.

    Raises:
        RlkvError: the file has other settings, or is of another kind.
    """

    def __init__(
        self,
        path: Path,
        targets: Mapping[str, Mapping[str, Any]],
        *,
        too_large: Mapping[str, list[str]],
        command: str,
        fresh: bool,
    ) -> None:
        machine = describe_machine()
        guarded = {name: machine[name] for name in ("cpu", "versions")}
        self._store = Store(path, FORMAT, guarded, fresh=fresh)
        self.content = content = self._store.content
        stored = content.get("targets", {})
        found = differences(stored, {key: targets[key] for key in targets if key in stored})
        if found:
            raise RlkvError(
                f"--output {one_line(path)}: has results of other settings ({'; '.join(found)}): "
                "name another file, or overwrite it with --fresh"
            )
        content.setdefault("machine", machine)
        content["targets"] = stored | targets
        content["too_large"] = content.get("too_large", {}) | too_large
        content["commands"] = list(dict.fromkeys([*content.get("commands", []), command]))
        content.setdefault("devices", {})
        #: In the order in which they were measured.
        self.results: list[Result] = content.setdefault("results", [])

    def find(self, case: str, target: str, point: Point) -> Result | None:
        """The result at a point, if there is one."""
        key = case, target, point
        found = (r for r in self.results if (r["case"], r["target"], r["point"]) == key)
        return next(found, None)

    def device(self, target: str) -> Device | None:
        """Measured speed of the device that a target runs on."""
        stored = self.content["devices"].get(target)
        return Device(**stored) if stored else None

    def set_device(self, target: str, device: Device) -> None:
        self.content["devices"][target] = asdict(device)

    def add(self, result: Result) -> None:
        """Add or replace a point's result and write the file."""
        old = self.find(result["case"], result["target"], result["point"])
        result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        result["load"] = os.getloadavg()[0]
        if old is None:
            self.results.append(result)
        else:
            self.results[self.results.index(old)] = result
        self._store.save()


def median(result: Result, variant: str, key: str) -> float:
    """Median of a metric over a variant's turns."""
    return statistics.median(sample[key] for sample in result["samples"][variant])
