"""What a job makes of the gates it found: a head profile, its evaluation, and a report."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.files import one_line
from rlkv_vllm.options import job_versions
from rlkv_vllm.profile import HeadProfile, ModelFingerprint, Provenance
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.tasks import Task
from rlkv_vllm.training.config import EvaluationConfig
from rlkv_vllm.training.curriculum import Curriculum
from rlkv_vllm.training.run_folder import PROFILE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def make_profile(
    fingerprint: ModelFingerprint,
    gates: list[list[float]],
    span: Span,
    task: Task,
    curriculum: Curriculum,
    *,
    method: str,
    source: str | None,
    seed: int,
    settings: dict[str, Any],
) -> HeadProfile:
    """A profile that says where its gates come from.

    Args:
        fingerprint: of the model.
        gates: ``[layers][KV heads]``.
        span: sink and window to serve with.
        task: of the problems.
        curriculum: the problems.
        method: that found the gates.
        source: its paper.
        seed: of the job.
        settings: of the job, plain values with ``task``; a local path of model or task is
            replaced by its name.
    """
    settings |= {"model": fingerprint.id, "task": {**settings["task"], "name": task.name}}
    return HeadProfile(
        model=fingerprint,
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


def evaluate_profile(
    profile: HeadProfile,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    used: Sequence[Any],
    wanted: EvaluationConfig,
    output: Path,
    *,
    seed: int,
    max_new_tokens: int,
    report: Report,
) -> HeadProfile:
    """Measure a profile on fresh problems, by mask.

    Args:
        profile: saved before, and again after every row.
        model: ungated.
        tokenizer: with a chat template.
        task: of the problems.
        used: problems that the gates were made from.
        wanted: where to evaluate.
        output: folder of the profile.
        seed: of the fresh problems.
        max_new_tokens: limit of an answer, if `wanted` has none.
        report: told about progress.

    Returns:
        The profile with its rows.
    """
    options = "curriculum.problems or evaluation.problems"
    problems = fresh_problems(task, wanted.problems, seed, used, options)
    if not problems:
        return profile
    for row in measure_gates(
        model,
        tokenizer,
        task,
        problems,
        profile.gates,
        sink=profile.sink,
        window=profile.window,
        sparsities=wanted.sparsities,
        max_new_tokens=wanted.max_new_tokens or max_new_tokens,
        batch_size=wanted.batch_size,
        seed=seed,
        report=report,
    ):
        profile = with_rows(profile, [row])
        save_profile(profile, output / PROFILE_FILE)
    return profile


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
