"""What long jobs tell on the command line: progress on stderr, and the result."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from rlkv_vllm.profile import HeadProfile

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")]


class StageProgress:
    """A bar per stage with the time left on a terminal, a line per finished stage elsewhere.

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
            if done == total:
                typer.echo(f"{stage}: {done}", err=True)
            return
        if stage not in self._stages:
            self._stages[stage] = int(self._bars.add_task(stage, total=total, state=state))
        task = self._bars.task_ids[self._stages[stage]]
        self._bars.update(task, completed=done, total=total, state=state)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.is_plain:
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


def print_result(profile: HeadProfile | None, output: Path) -> None:
    """Print the evaluation of a job's profile, and where it lies; nothing without a profile."""
    if profile is not None:
        print_evaluation(profile)
        typer.echo(f"wrote {output / 'profile.json'} and {output / 'report.html'}")


def print_evaluation(profile: HeadProfile) -> None:
    """Print accuracy and length at every sparsity of a profile."""
    if profile.evaluation:
        typer.echo("sparsity  accuracy  output tokens")
    for row in profile.evaluation:
        typer.echo(f"{row.sparsity:>8g}  {row.accuracy:>8.3f}  {row.mean_output_tokens:>13.1f}")
