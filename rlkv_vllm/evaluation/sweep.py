"""Accuracy against sparsity: all rows of a table, one engine after the other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.engine.compat import installed_vllm
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.record import Record, Row
from rlkv_vllm.evaluation.rows import evaluation_row, with_rows
from rlkv_vllm.evaluation.splits import Split, concerns
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.models import folder_digest
from rlkv_vllm.profile.choice import ProfileChoice
from rlkv_vllm.profile.io import load_profile, profile_text
from rlkv_vllm.profile.lookup import is_own_file
from rlkv_vllm.profile.schema import EvaluationRow, ModelFingerprint
from rlkv_vllm.tasks import Problem
from rlkv_vllm.tasks.measurement import Measurement


def run(
    splits: Sequence[Split],
    answer: Callable[[Split], Measurement],
    record: Record,
    on_row: Callable[[Row, bool], None],
) -> None:
    """Measure all splits, the full cache first, those that serve alike once.

    `answer` starts an engine and answers the problems. Rows in the record are not measured again.
    `on_row` is called after every row, with whether it was known already.

    Raises:
        RlkvError: an engine failed; the rows before it are in the record's files.
    """
    full: Measurement | None = None
    for split in splits:
        measurement = record.find(split)
        reused = measurement is not None
        if measurement is None:
            try:
                measurement = answer(split)
            except (RlkvError, ModuleNotFoundError):
                raise
            except Exception as error:  # vLLM's engine may raise anything
                raise RlkvError(
                    f"{split.label} at sparsity {split.sparsity:g}: the engine failed "
                    f"({type(error).__name__}: {one_line(error)}): finished rows are kept with "
                    "--output, the same command continues; VLLM_LOGGING_LEVEL=INFO shows vLLM's log"
                ) from error
        full = full or measurement
        on_row(record.add(split, measurement, full), reused)


def settings_of(
    model: ModelFingerprint,
    source: str,
    task: str,
    problems: Sequence[Problem],
    seed: int,
    sampling: Sampling,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings that all rows of one table share.

    `source` is the folder or Hub id of the weights; `options` are all others that change answers.
    """
    asked = [[problem.messages, problem.answer] for problem in problems]
    return {
        "model": model.id,
        "model_version": folder_digest(Path(source)) if Path(source).is_dir() else model.revision,
        "task": task,
        "n": len(problems),
        "seed": seed,
        "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        **sampling.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"}),
        **options,
        "vllm": installed_vllm(),
    }


def profile_rows(
    rows: Sequence[Row],
    candidates: Mapping[str, ProfileChoice],
    *,
    task: str,
    seed: int,
    sampling: Sampling,
) -> dict[str, list[EvaluationRow]]:
    """The rows of every profile, those of both baselines included."""
    full = rows[0].measurement
    return {
        label: [
            evaluation_row(
                task,
                row.split.sparsity,
                row.measurement,
                full,
                seed=seed,
                sampling=sampling,
                allocation=row.split.digest,
            )
            for row in rows
            if concerns(row.split, label, choice)
        ]
        for label, choice in candidates.items()
    }


def check_can_take_rows(choice: ProfileChoice) -> None:
    """Refuse to write into profiles that are not the user's own, or would not fit the rows.

    Raises:
        RlkvError: the profile is of the package or the Hub, cannot be written, or was evaluated
            with another sink or window than its own.
    """
    name, path, profile = one_line(choice.name), choice.path, choice.profile
    if not is_own_file(choice.name, path):
        raise RlkvError(
            f"--write-rows: profile {name} is not a file of yours: copy it (cp {path} "
            "my_profile.json) and give --profile my_profile.json"
        )
    if choice.span != (profile.sink, profile.window):
        raise RlkvError(
            f"--write-rows: profile {name} has sink {profile.sink} and window {profile.window}, "
            f"not {choice.span.sink} and {choice.span.window}: leave --sink and --window out"
        )
    if not os.access(path, os.W_OK) or not os.access(path.resolve().parent, os.W_OK):
        raise RlkvError(f"--write-rows: {path} cannot be written: copy it to a folder of yours")


def write_rows(
    candidates: Mapping[str, ProfileChoice], rows: Mapping[str, Sequence[EvaluationRow]]
) -> None:
    """Put the rows, by label, into all profiles or none, as `with_rows`.

    Raises:
        RlkvError: if a profile changed its gates in the meantime or cannot be written.
    """
    files: dict[Path, bytes] = {}
    for label, choice in candidates.items():
        profile = load_profile(choice.path)
        if profile.gates != choice.profile.gates:
            raise RlkvError(
                f"--write-rows: {choice.path}: the gates changed during the evaluation: run it "
                "again"
            )
        files[choice.path] = profile_text(with_rows(profile, rows[label])).encode()
    write_bytes_atomic(files)
