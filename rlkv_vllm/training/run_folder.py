"""What a run of `rlkv train` or `rlkv refine` leaves in its folder, read as far as it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.profile.schema import HeadProfile

PROFILE_FILE, REFINE_FILE = "profile.json", "refine.json"
METRICS_FILE, GATES_LOG_FILE = "metrics.jsonl", "gates.jsonl"


@dataclass
class RunFolder:
    """What could be read of a run.

    Attributes:
        name: of its folder.
        profile: the head profile, if it got that far.
        metrics: a mapping per training step, in order.
        gates: (step, gates ``[layers][KV heads]``), in order.
        refinement: what came out of it; empty without a refinement, or before its end.
        curriculum: figures of the problem set.
        config: text of run.yaml.
        missing: what is not there or not readable, in words.
    """

    name: str
    profile: HeadProfile | None
    metrics: list[dict[str, Any]]
    gates: list[tuple[int, list[list[float]]]]
    refinement: Mapping[str, Any]
    curriculum: Mapping[str, Any]
    config: str
    missing: list[str]

    @property
    def model(self) -> str | None:
        """The model, by the profile or else by the configuration."""
        if self.profile is not None:
            return self.profile.model.id
        try:
            config = yaml.safe_load(self.config)
        except (yaml.YAMLError, ValueError, RecursionError):
            return None
        model = config.get("model") if isinstance(config, dict) else None
        return None if model is None else one_line(model, 100)


def read_run(run_dir: Path) -> RunFolder:
    """Read a run that may have been stopped anywhere.

    Raises:
        RlkvError: if there is no such folder, or nothing of a run in it.
    """
    missing: list[str] = []
    if not run_dir.is_dir():
        raise RlkvError(f"{one_line(run_dir)}: no such folder: give the folder of a run")
    # `rlkv refine` trains nothing.
    logs = [run_dir / name for name in (METRICS_FILE, GATES_LOG_FILE)]
    is_training = not (run_dir / REFINE_FILE).exists() or any(log.exists() for log in logs)
    run = RunFolder(
        name=run_dir.resolve().name,
        profile=_read_profile(run_dir / PROFILE_FILE, missing),
        metrics=_read_metrics(logs[0], missing) if is_training else [],
        gates=_read_gates(logs[1], missing) if is_training else [],
        refinement=_read_refinement(run_dir / REFINE_FILE, missing),
        curriculum=_read_mapping(run_dir / "curriculum.json", "the curriculum", missing),
        config=_read_text(run_dir / "run.yaml", "the configuration", missing),
        missing=missing,
    )
    if not (run.profile or run.metrics or run.gates or run.curriculum or run.config):
        raise RlkvError(
            f"{one_line(run_dir)}: holds nothing of a run ({'; '.join(missing)}): give the "
            "output folder of `rlkv train` or `rlkv refine`"
        )
    if run.profile is not None and not run.profile.evaluation:
        missing.append("accuracy against sparsity: the profile has no evaluation rows")
    return run


def _read_text(path: Path, what: str, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing.append(f"{what}: there is no {path.name}")
    except (OSError, ValueError) as error:
        missing.append(f"{what}: {path.name} cannot be read ({one_line(error)})")
    return ""


def _read_profile(path: Path, missing: list[str]) -> HeadProfile | None:
    if not path.exists():
        missing.append("gates of the result and their accuracy: there is no profile.json")
        return None
    try:
        return load_profile(path)
    except RlkvError as error:
        missing.append(f"gates of the result and their accuracy: {error}")
        return None


def step_rows(text: str) -> tuple[dict[int, dict[str, Any]], int]:
    """The rows of a log by their step, in order, and the number of lines that cannot be read.

    Of steps that were done again it is the last row; a kill or a full disk may cut off a line.
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


def _read_lines(path: Path, what: str, missing: list[str]) -> dict[int, dict[str, Any]]:
    rows, damaged = step_rows(_read_text(path, what, missing))
    if damaged:
        missing.append(f"{damaged} lines of {path.name} that cannot be read")
    return rows


def _read_metrics(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    return list(_read_lines(path, "reward, penalty and length of the steps", missing).values())


def _read_gates(path: Path, missing: list[str]) -> list[tuple[int, list[list[float]]]]:
    found: list[tuple[int, list[list[float]]]] = []
    for step, row in _read_lines(path, "gates of the steps", missing).items():
        try:
            table = [[float(gate) for gate in layer] for layer in row["gates"]]
        except (ValueError, TypeError, KeyError):
            continue
        shape = [len(layer) for layer in table]
        # A row of another shape would be one of another model.
        if shape and all(shape) and (not found or shape == [len(x) for x in found[0][1]]):
            found.append((step, table))
    return found


def _read_refinement(path: Path, missing: list[str]) -> Mapping[str, Any]:
    if not path.exists():  # most runs have none
        return {}
    result = _read_mapping(path, "the refinement", missing).get("result")
    if result is None:
        missing.append("the refinement: it is not finished")
    return result if isinstance(result, dict) else {}


def _read_mapping(path: Path, what: str, missing: list[str]) -> Mapping[str, Any]:
    text = _read_text(path, what, missing)
    try:
        content = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        missing.append(f"{what}: {path.name} cannot be read ({one_line(error)})")
        return {}
    return content if isinstance(content, dict) else {}
