"""What long jobs tell on the command line: progress on stderr, and the result."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from rlkv_vllm.cli.tables import print_next
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from rlkv_vllm.profile import HeadProfile
    from rlkv_vllm.training.config import JobConfig

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")]


class StageProgress:
    """A bar per stage with the time left on a terminal, elsewhere up to 100 lines per stage.

    `threads` are those of the job on the CPU; None leaves PyTorch's choice.
    """

    def __init__(self, threads: int | None = None) -> None:
        from rich import progress
        from rich.console import Console

        if threads is not None:
            from rlkv_vllm.hf.loading import set_threads

            set_threads(threads)
        console = Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<12}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.is_plain = not console.is_terminal
        #: Stage and per cent of the last line, begin of its stage, time of the last line.
        self._line, self._since, self._last = ("", -1), 0.0, time.monotonic()
        #: Under `accelerate launch` one process tells.
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self._stages: dict[str, int] = {}

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def report(self, stage: str, done: int, total: int, state: str = "") -> None:
        """Work done and work in all of a stage, with a few words on its state."""
        if self.is_plain:
            if stage != self._line[0]:
                self._since = self._last
            line = (stage, 100 * done // max(1, total))
            if line != self._line:
                figures = f"{state}, " if state else ""
                self.say(
                    f"{stage}: {done}/{total}, {figures}{time.monotonic() - self._since:.1f} s"
                )
            self._line = line
            return
        if stage not in self._stages:
            self._stages[stage] = int(self._bars.add_task(stage, total=total, state=state))
        task = self._bars.task_ids[self._stages[stage]]
        self._bars.update(task, completed=done, total=total, state=state)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.is_plain:
            self._last = time.monotonic()
            typer.echo(text, err=True)
        else:
            self._bars.console.print(text, highlight=False, soft_wrap=True)


def require_packages(command: str, *names: str) -> None:
    """Refuse to start without packages of `rlkv-vllm[train]`.

    Raises:
        RlkvError: naming the missing ones.
    """
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise RlkvError(f"{command} needs {', '.join(missing)}: pip install 'rlkv-vllm[train]'")


def print_result(profile: HeadProfile | None, job: JobConfig, max_tokens: object) -> None:
    """Print the evaluation of a job's profile, where it lies, and the commands to run next.

    Nothing without a profile. `max_tokens` limits an answer where the evaluation
    of the job sets no limit.
    """
    if profile is None:
        return
    print_evaluation(profile)
    path = job.output / "profile.json"
    typer.echo(f"wrote {path} and {job.output / 'report.html'}")
    given = [job.model, "--profile", str(path)]
    asked = {
        "max_tokens": job.evaluation.max_new_tokens or max_tokens,
        **job.task.model_dump(exclude_defaults=True),
    }
    served = {"revision": job.revision} if job.revision else {}
    if profile.recommended_sparsity is None:
        served["sparsity"] = "0.5"
    print_next("eval", *given, *_flags(asked))
    print_next("serve", *given, *_flags(served), lead="  or")


def _flags(options: Mapping[str, object]) -> list[str]:
    names = {"name": "task"}  # else those of the configuration
    pairs = {names.get(key, key).replace("_", "-"): str(value) for key, value in options.items()}
    return [word for name, value in pairs.items() for word in (f"--{name}", value)]


def print_evaluation(profile: HeadProfile) -> None:
    """Print accuracy and length at every sparsity of a profile, and what it recommends."""
    from rlkv_vllm.profile.budget import ENOUGH_PROBLEMS, MAX_LOSS

    if not profile.evaluation:
        return
    typer.echo("sparsity  accuracy  output tokens")
    for row in profile.evaluation:
        typer.echo(f"{row.sparsity:>8g}  {row.accuracy:>8.3f}  {row.mean_output_tokens:>13.1f}")
    best = profile.recommended_sparsity
    typer.echo(
        f"recommended sparsity: {'none' if best is None else f'{best:g}'} (the largest one that "
        f"is at least measured, over {ENOUGH_PROBLEMS} problems or more, for a loss of "
        f"{100 * MAX_LOSS:g} points, together with all smaller ones)"
    )
