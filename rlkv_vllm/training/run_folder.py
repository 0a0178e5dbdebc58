"""What a run of `rlkv train` or `rlkv refine` leaves in its folder, as far as it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.options import RUN_FILE, read_options
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.profile.schema import HeadProfile

PROFILE_FILE, REFINE_FILE = "profile.json", "refine.json"
METRICS_FILE, GATES_LOG_FILE = "metrics.jsonl", "gates.jsonl"


class RunFolder:
    """A run that may have been stopped anywhere.

    `metrics` has a mapping per training step, `gates` (step, gates ``[layers][KV heads]``), both
    in order. `refinement` is the result of the search, empty before its end; `config` the text of
    run.yaml; `missing` what is not there or not readable, in words. An `RlkvError` if there is no
    such folder, or nothing of a run in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise RlkvError(f"{one_line(path)}: no such folder: give the folder of a run")
        self._path = path
        self.name = path.resolve().name
        self.missing: list[str] = []
        self.profile = self._read_profile()
        # `rlkv refine` trains nothing.
        logs = [path / METRICS_FILE, path / GATES_LOG_FILE]
        is_refinement = (path / REFINE_FILE).exists()
        is_training = not is_refinement or any(log.exists() for log in logs)
        steps = "reward, penalty and length of the steps"
        self.metrics = [*self._read_rows(METRICS_FILE, steps).values()] if is_training else []
        self.gates = self._read_gates() if is_training else []
        self.refinement = self._read_refinement() if is_refinement else {}
        self.curriculum = self._read_mapping("curriculum.json", "the curriculum")
        self.config = self._read_text(RUN_FILE, "the configuration")
        if not (self.profile or self.metrics or self.gates or self.curriculum or self.config):
            raise RlkvError(
                f"{one_line(path)}: holds nothing of a run ({'; '.join(self.missing)}): give the "
                "output folder of `rlkv train` or `rlkv refine`"
            )
        if self.profile is not None and not self.profile.evaluation:
            self.missing.append("accuracy against sparsity: the profile has no evaluation rows")
        self.model = self._read_model()

    def _read_model(self) -> str | None:
        if self.profile is not None:
            return self.profile.model.id
        try:
            model = read_options(self._path / RUN_FILE, "").get("model")
        except RlkvError:
            return None
        return None if model is None else one_line(model, 100)

    def _read_text(self, name: str, what: str) -> str:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            self.missing.append(f"{what}: there is no {name}")
        except (OSError, ValueError) as error:
            self.missing.append(f"{what}: {name} cannot be read ({one_line(error)})")
        return ""

    def _read_profile(self) -> HeadProfile | None:
        path, reason = self._path / PROFILE_FILE, f"there is no {PROFILE_FILE}"
        try:
            if path.exists():
                return load_profile(path)
        except RlkvError as error:
            reason = str(error)
        self.missing.append(f"gates of the result and their accuracy: {reason}")
        return None

    def _read_rows(self, name: str, what: str) -> dict[int, dict[str, Any]]:
        rows, damaged = step_rows(self._read_text(name, what))
        if damaged:
            self.missing.append(f"{damaged} lines of {name} that cannot be read")
        return rows

    def _read_gates(self) -> list[tuple[int, list[list[float]]]]:
        found: list[tuple[int, list[list[float]]]] = []
        for step, row in self._read_rows(GATES_LOG_FILE, "gates of the steps").items():
            try:
                table = [[float(gate) for gate in layer] for layer in row["gates"]]
            except (ValueError, TypeError, KeyError):
                continue
            shape = [len(layer) for layer in table]
            # A row of another shape would be one of another model.
            if shape and all(shape) and (not found or shape == [len(x) for x in found[0][1]]):
                found.append((step, table))
        return found

    def _read_refinement(self) -> Mapping[str, Any]:
        result = self._read_mapping(REFINE_FILE, "the refinement").get("result")
        if result is None:
            self.missing.append("the refinement: it is not finished")
        return result if isinstance(result, dict) else {}

    def _read_mapping(self, name: str, what: str) -> Mapping[str, Any]:
        text = self._read_text(name, what)
        try:
            content = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            self.missing.append(f"{what}: {name} cannot be read ({one_line(error)})")
            return {}
        return content if isinstance(content, dict) else {}


def step_rows(text: str) -> tuple[dict[int, dict[str, Any]], int]:
    """The rows of a log by their step, in order, and the number of lines that cannot be read.

    A step that was done again has its last row; a kill or a full disk may cut off a line.
    """
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
    return dict(sorted(rows.items())), damaged
