"""Progress of long work: bars with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import typer


class StageProgress:
    """A bar per stage on a terminal, a line per finished stage elsewhere; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.is_plain = not console.is_terminal
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
