"""Accuracy against sparsity: all rows of a table, one engine after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from rlkv_vllm.answers import Sampling
from rlkv_vllm.engine.compat import installed_vllm
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.looks import Schedule
from rlkv_vllm.evaluation.record import Record, Row
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.evaluation.splits import Ask, Split, concerns
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.models import folder_digest
from rlkv_vllm.profile.budget import LEVEL, Verdict, assess
from rlkv_vllm.profile.choice import ProfileChoice
from rlkv_vllm.profile.io import load_profile, profile_text
from rlkv_vllm.profile.lookup import is_own_file
from rlkv_vllm.profile.schema import EvaluationRow, ModelFingerprint
from rlkv_vllm.tasks import Problem, problems_digest
from rlkv_vllm.tasks.measurement import Measurement


class Listener(Protocol):
    """Hears of the progress of a sweep."""

    def on_look(self, row: Row) -> None:
        """A look decided nothing yet."""

    def on_row(self, row: Row, is_reused: bool) -> None:
        """A row is finished; `is_reused`: it was known already."""

    def on_left_out(self, split: Split, violated: float) -> None:
        """A split is not measured, as the smaller sparsity `violated` is beyond the budget."""


def run(
    splits: Sequence[Split],
    opened: Callable[[Split], AbstractContextManager[Ask]],
    record: Record,
    plan: Schedule,
    make_row: Callable[..., EvaluationRow],
    report: Listener,
) -> None:
    """Measure all splits, the full cache first, those that serve alike once.

    With a budget to be decided a split ends at the first look that proves or violates it. Then
    larger sparsities of a profile that violates it are left out: only a sparsity that holds with
    all smaller ones is recommended.

    Args:
        splits: from `splits.plan`: those of a profile in ascending order.
        opened: starts what answers the problems with a split.
        record: of finished rows, which are not measured again; rows in progress continue.
        plan: when to look at the answers.
        make_row: `rows.evaluation_row` for this evaluation: task, seed, sampling are filled in.
        report: hears of looks, rows and splits that are left out.

    Raises:
        RlkvError: an engine failed; the rows before it are in the record's files.
    """
    full: Measurement | None = None
    violated: dict[str, float] = {}  # the first sparsity that does, by label
    labels = {split.label for split in splits if 0 < split.sparsity < 1}

    def row_of(split: Split, measured: Measurement) -> Row:
        # With the full cache all planned problems are answered: there is nothing to stop.
        level = plan.level(measured.n) if split.sparsity else LEVEL
        base = full or measured
        made = make_row(split.sparsity, measured, base, allocation=split.digest, level=level)
        return Row(split, measured, base, assess(made, plan.max_loss))

    for split in splits:
        of_profiles = labels if split.sparsity == 1 else {split.label}
        if plan.stops and of_profiles and of_profiles <= violated.keys():
            report.on_left_out(split, max(violated[label] for label in of_profiles))
            continue
        row, reused = _measure(split, opened, record, plan, row_of, report)
        full = full or row.measurement
        if row.verdict is Verdict.VIOLATED:
            violated.setdefault(split.label, split.sparsity)
        report.on_row(row, reused)


def _measure(
    split: Split,
    opened: Callable[[Split], AbstractContextManager[Ask]],
    record: Record,
    plan: Schedule,
    row_of: Callable[[Split, Measurement], Row],
    report: Listener,
) -> tuple[Row, bool]:
    """The row of a split, and whether nothing had to be answered for it."""
    measured = record.find(split)
    if measured is not None:
        row = record.add(row_of(split, measured))
        if _is_finished(row, plan):
            return row, True
    try:
        with opened(split) as ask:
            for look in plan.looks:
                start = measured.n if measured else 0
                if look.problems <= start:
                    continue
                new = ask(start, look.problems)
                measured = measured.then(new) if measured else new
                row = record.add(row_of(split, measured))
                if _is_finished(row, plan):
                    break
                report.on_look(row)
    except (RlkvError, ModuleNotFoundError):
        raise
    except Exception as error:  # vLLM's engine may raise anything
        raise RlkvError(
            f"{split.label} at sparsity {split.sparsity:g}: the engine failed "
            f"({type(error).__name__}: {one_line(error)}): finished rows are kept with "
            "--output, the same command continues; VLLM_LOGGING_LEVEL=INFO shows vLLM's log"
        ) from error
    return row, False


def _is_finished(row: Row, plan: Schedule) -> bool:
    if row.measurement.n == plan.problems:
        return True
    is_decided = row.verdict in (Verdict.PROVEN, Verdict.VIOLATED)
    return plan.stops and row.split.sparsity > 0 and is_decided


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
    return {
        "model": model.id,
        "model_version": folder_digest(Path(source)) if Path(source).is_dir() else model.revision,
        "task": task,
        "n": len(problems),
        "seed": seed,
        "problems": problems_digest(problems),
        **sampling.model_dump(exclude={"seed", "stop_token_ids"}),
        **options,
    }


def settings_of_looks(plan: Schedule, by: str) -> dict[str, Any]:
    """When the answers are looked at, and what writes them: "engine" or "mask", its version.

    Not the budget: the bounds of a look hold for every one.
    """
    is_served = by == "engine"
    writer = {"vllm": installed_vllm()} if is_served else {"transformers": version("transformers")}
    looks = [[look.problems, look.level] for look in plan.looks]
    return {"looks": looks, "by": by, **writer}


def profile_rows(
    rows: Sequence[Row], candidates: Mapping[str, ProfileChoice]
) -> dict[str, list[Row]]:
    """The rows of every profile, those of both baselines included."""
    return {
        label: [row for row in rows if concerns(row.split, label, choice)]
        for label, choice in candidates.items()
    }


def check_can_take_rows(choice: ProfileChoice) -> None:
    """Refuse to write into profiles that are not the user's own.

    Raises:
        RlkvError: the profile is of the package or the Hub, or cannot be written.
    """
    name, path = one_line(choice.name), choice.path
    if not is_own_file(choice.name, path):
        raise RlkvError(
            f"--write-rows: profile {name} is not a file of yours: copy it (cp {path} "
            "my_profile.json) and give --profile my_profile.json"
        )
    if not os.access(path, os.W_OK) or not os.access(path.resolve().parent, os.W_OK):
        raise RlkvError(f"--write-rows: {path} cannot be written: copy it to a folder of yours")


def write_rows(candidates: Mapping[str, ProfileChoice], rows: Mapping[str, Sequence[Row]]) -> None:
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
        new = [row.evaluation for row in rows[label]]
        files[choice.path] = profile_text(with_rows(profile, new)).encode()
    write_bytes_atomic(files)
