"""What `rlkv train` and `rlkv refine` have in common: their folder, problems and result."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from accelerate import PartialState

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.files import one_line
from rlkv_vllm.options import RUN_FILE, job_versions, save_options
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.tasks import get_task, skip_note
from rlkv_vllm.training.config import JobConfig
from rlkv_vllm.training.curriculum import Curriculum, make_curriculum
from rlkv_vllm.training.report import write_report
from rlkv_vllm.training.run_folder import PROFILE_FILE
from rlkv_vllm.training.solver import Solver

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Listener:
    """Hears of the progress of a job; `on_step` of the figures and the number of steps."""

    report: Report = lambda stage, done, total, state="": None
    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    say: Callable[[str], None] = lambda text: None


QUIET = Listener()
_Config = TypeVar("_Config", bound=JobConfig)
_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class Run:
    """A job in its folder, with its model and task loaded."""

    def __init__(self, config: JobConfig, listener: Listener, device: torch.device) -> None:
        self._config, self._listener = config, listener
        self.processes = PartialState()  # those of `accelerate launch`; one without it
        task = get_task(**config.task.model_dump())
        if note := skip_note(task):
            listener.say(note)
        self.solver = Solver.load(config, task, device)
        if self.processes.is_main_process:
            save_options(config, config.output / RUN_FILE)

    def curriculum(
        self, n: int, keep: int | None, sampling: Sampling, batch_size: int
    ) -> Curriculum:
        """The problems that the model solves; arguments and errors as of `make_curriculum`."""
        made = make_curriculum(
            self.solver,
            self._config.output,
            n=n,
            keep=keep,
            sampling=sampling.model_copy(update={"seed": self._config.seed}),
            batch_size=batch_size,
            processes=self.processes,
            report=partial(self._listener.report, "curriculum"),
        )
        self._listener.say(
            f"curriculum: {len(made.problems)} of {made.tried} problems kept, answers of "
            f"{made.mean_tokens:.0f} tokens on average, {made.capped_share:.0%} cut off"
        )
        return made

    def finish(
        self,
        gates: list[list[float]],
        span: Span,
        curriculum: Curriculum,
        method: str,
        source: str | None,
        settings: dict[str, Any],
        *,
        sampling: Sampling,
        is_evaluated: bool = True,
    ) -> HeadProfile:
        """Write the profile, evaluate it by mask on fresh problems, and report.

        `settings` are recorded beside the options of the job. `sampling` is that of its answers,
        and of the evaluation unless its options say otherwise.
        """
        config, solver, task = self._config, self.solver, self.solver.task
        options = config.model_dump(mode="json", exclude={"output", "evaluation"}) | settings
        options["sampling"] = sampling.model_dump(mode="json", exclude={"seed"})
        # Where a local copy lies is nobody else's business.
        options |= {"model": solver.fingerprint.id, "task": {**options["task"], "name": task.name}}
        profile = HeadProfile(
            model=solver.fingerprint,
            gates=gates,
            sink=span.sink,
            window=span.window,
            provenance=Provenance(
                method=method,
                source=source,
                config=options,
                seed=config.seed,
                versions=job_versions(),
                created=date.today(),
                data=f"{len(curriculum.problems)} problems of task {task.name} (seed "
                f"{config.seed}) that the model solves, of {curriculum.tried} (sha256 "
                f"{curriculum.sha256[:16]})",
            ),
        )
        save_profile(profile, config.output / PROFILE_FILE)
        wanted, seed = config.evaluation, config.seed + 1
        problems = fresh_problems(
            task,
            wanted.problems if is_evaluated else 0,
            seed,
            curriculum.problems,
            "the number of problems of the job or evaluation.problems",
        )
        rows = measure_gates(
            solver.model,
            solver.tokenizer,
            task,
            problems,
            gates,
            sink=span.sink,
            window=span.window,
            sparsities=wanted.sparsities,
            sampling=wanted.sampling(sampling, seed),
            samples=wanted.samples,
            batch_size=wanted.batch_size,
            seed=seed,
            report=self._listener.report,
        )
        for row in rows if problems else ():
            profile = with_rows(profile, [row])
            save_profile(profile, config.output / PROFILE_FILE)
        write_report(config.output)
        return profile


def check_output(output: Path, resume: bool, files: Sequence[str]) -> None:
    """Refuse a file, and a folder with some of the `files` that an earlier run leaves."""
    if output.exists() and not output.is_dir():
        raise RlkvError(f"--output {output}: is a file: give a folder")
    if not resume and any((output / name).exists() for name in files):
        raise RlkvError(
            f"--output {output}: holds an earlier run: give --resume to continue it, or choose "
            "another folder"
        )


def explained_failures(
    job: Callable[Concatenate[_Config, _P], _Result],
) -> Callable[Concatenate[_Config, _P], _Result]:
    """Name the folder of a job if one of its files cannot be written or read.

    That is an `OSError`, or a full disk that looks like another error.
    """

    @wraps(job)
    def run(config: _Config, /, *args: _P.args, **options: _P.kwargs) -> _Result:
        try:
            return job(config, *args, **options)
        except (OSError, RuntimeError, RlkvError) as error:
            reason = _failed_file(error)
            if reason is None:
                raise
            raise RlkvError(
                f"--output {config.output}: cannot be written or read ({one_line(reason)}): fix "
                "that (free space?) and continue with --resume"
            ) from error

    return run


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
