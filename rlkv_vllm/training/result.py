"""What a job makes of the gates it found: a head profile, its evaluation, and a report."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.files import one_line
from rlkv_vllm.options import job_versions
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.training.config import EvaluationConfig
from rlkv_vllm.training.curriculum import Curriculum
from rlkv_vllm.training.report import write_report
from rlkv_vllm.training.run_folder import PROFILE_FILE
from rlkv_vllm.training.solver import Solver


@dataclass(frozen=True)
class Listener:
    """Hears of the progress of a job.

    Attributes:
        report: (stage, work done, work in all).
        on_step: figures of a training step, and the number of steps.
        say: a line of text.
    """

    report: Report = lambda stage, done, total: None
    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    say: Callable[[str], None] = lambda text: None

    def curriculum(self, made: Curriculum) -> None:
        """Say what a curriculum holds."""
        self.say(
            f"curriculum: {len(made.problems)} of {made.tried} problems kept, answers of "
            f"{made.mean_tokens:.0f} tokens on average, {made.capped_share:.0%} cut off"
        )


QUIET = Listener()


def write_result(
    gates: list[list[float]],
    span: Span,
    solver: Solver,
    curriculum: Curriculum,
    output: Path,
    listener: Listener,
    *,
    method: str,
    source: str | None,
    seed: int,
    settings: dict[str, Any],
    evaluation: EvaluationConfig,
    max_new_tokens: int,
) -> HeadProfile:
    """Write the profile of a job, evaluate it by mask on fresh problems, and report.

    The profile is saved after every row of the evaluation.

    Args:
        gates: ``[layers][KV heads]``.
        span: sink and window to serve with.
        solver: model and task.
        curriculum: problems that the gates were made from.
        output: folder of the run.
        listener: told about progress.
        method: that found the gates.
        source: its paper.
        seed: of the job; the fresh problems have the next.
        settings: of the job, plain values with ``task``; a local path of model or task is
            replaced by its name.
        evaluation: where to evaluate; no problems leave it out.
        max_new_tokens: limit of an answer, if `evaluation` has none.
    """
    task = solver.task
    model_name = solver.fingerprint.id
    settings |= {"model": model_name, "task": {**settings["task"], "name": task.name}}
    profile = HeadProfile(
        model=solver.fingerprint,
        gates=gates,
        sink=span.sink,
        window=span.window,
        provenance=Provenance(
            method=method,
            source=source,
            config=settings,
            seed=seed,
            versions=job_versions(),
            created=date.today(),
            data=f"{len(curriculum.problems)} problems of task {task.name} (seed {seed}) "
            f"that the model solves, of {curriculum.tried} (sha256 {curriculum.sha256[:16]})",
        ),
    )
    save_profile(profile, output / PROFILE_FILE)
    flags = "the number of problems of the job or evaluation.problems"
    problems = fresh_problems(task, evaluation.problems, seed + 1, curriculum.problems, flags)
    rows = measure_gates(
        solver.model,
        solver.tokenizer,
        task,
        problems,
        gates,
        sink=span.sink,
        window=span.window,
        sparsities=evaluation.sparsities,
        max_new_tokens=evaluation.max_new_tokens or max_new_tokens,
        batch_size=evaluation.batch_size,
        seed=seed + 1,
        report=listener.report,
    )
    for row in rows if problems else ():
        profile = with_rows(profile, [row])
        save_profile(profile, output / PROFILE_FILE)
    write_report(output)
    return profile


def check_output(output: Path, resume: bool, files: Sequence[str]) -> None:
    """Refuse a folder that a job must not write to.

    Args:
        output: folder of the run.
        resume: continue what it holds.
        files: that only an earlier run leaves.

    Raises:
        RlkvError: it is a file, or holds a run that is not to be continued.
    """
    if output.exists() and not output.is_dir():
        raise RlkvError(f"--output {output}: is a file: give a folder")
    if not resume and any((output / name).exists() for name in files):
        raise RlkvError(
            f"--output {output}: holds an earlier run: give --resume to continue it, or choose "
            "another folder"
        )


@contextmanager
def explained_failures(output: Path) -> Iterator[None]:
    """Name the folder of a job if one of its files cannot be written or read.

    Raises:
        RlkvError: for an `OSError`, and for a full disk where it looks like another error.
    """
    try:
        yield
    except (OSError, RuntimeError, RlkvError) as error:
        reason = _failed_file(error)
        if reason is None:
            raise
        raise RlkvError(
            f"--output {output}: cannot be written or read ({one_line(reason)}): fix that (free "
            "space?) and continue with --resume"
        ) from error


def _failed_file(error: BaseException) -> str | None:
    """What went wrong with a file, if that is what `error` is about."""
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, RlkvError):  # other causes have a message that says what to do
        cause = error.__cause__
        is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return str(cause) if is_full else None
    # `torch.save` has no type of its own for it.
    is_save = any(part in str(error) for part in ("inline_container", "PytorchStreamWriter"))
    return f"a checkpoint is cut off: {error}" if is_save else None
