"""What ``rlkv eval`` tells: its progress and its table."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from rlkv_vllm.cli.tables import new_table, print_plain
from rlkv_vllm.evaluation.conclusion import length_note
from rlkv_vllm.evaluation.looks import Schedule
from rlkv_vllm.evaluation.record import Row
from rlkv_vllm.evaluation.splits import Split

_COLUMNS = (
    "sparsity", "n", "accuracy", "95% interval", "loss (at most)", "verdict", "mean tokens", "p95",
    "at cap", "s/solved", "p",
)  # fmt: skip
_NOTE = (
    "loss: points of accuracy below the full cache, with its one-sided 95% bound. verdict: for a "
    "loss of at most\n{budget}, at most 10% longer answers and 2 points more cut off. s/solved: "
    "seconds of the whole run per correct answer,\nall problems in flight together; a throughput "
    "of this machine, its start not counted. p: exact two-sided sign test against the full cache."
)


class Teller:
    """Tells of finished rows, and keeps them."""

    def __init__(self, splits: int, schedule: Schedule, max_tokens: int) -> None:
        self.rows: list[Row] = []
        self._splits, self._schedule, self._max_tokens = splits, schedule, max_tokens
        self._done = 0

    def on_look(self, row: Row) -> None:
        """A line, where a look may end a split."""
        if self._schedule.stops and row.split.sparsity:
            typer.echo(
                f"  {row.split.label}, sparsity {row.split.sparsity:g} after "
                f"{row.measurement.n} of {self._schedule.problems} problems: "
                f"{row.assessment.describe()}"
            )

    def on_row(self, row: Row, is_reused: bool) -> None:
        """A line."""
        self.rows.append(row)
        measured = row.measurement
        how = f"{measured.seconds:.1f} s" if measured.seconds else "by mask"
        how = "already measured" if is_reused else how
        self._say(
            row.split,
            f"{measured.solved} of {len(measured.correct)} solved, "
            f"{measured.mean_output_tokens:.0f} tokens on average ({how})",
        )
        note = length_note(measured, self._max_tokens, self._schedule)
        if row.split.sparsity == 0 and note:
            typer.echo(note, err=True)

    def on_left_out(self, split: Split, violated: float) -> None:
        """A line that says why."""
        self._say(split, f"not measured, as sparsity {violated:g} is beyond the budget")

    def _say(self, split: Split, text: str) -> None:
        self._done += 1
        where = f"[{self._done}/{self._splits}] {split.label}, sparsity {split.sparsity:g}"
        typer.echo(f"{where}: {text}")


def print_rows(title: str, rows: Sequence[Row], max_loss: float) -> None:
    """The table."""
    table = new_table("profile", *_COLUMNS)
    table.title = title
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        measured, loss = row.measurement, row.assessment.loss
        low, high = measured.interval
        seconds = measured.seconds_per_solved
        is_full = row.split.sparsity == 0
        table.add_row(
            row.split.label,
            f"{row.split.sparsity:g}",
            str(measured.n),
            f"{measured.accuracy:.3f}",
            f"{low:.3f}-{high:.3f}",
            "-" if is_full else f"{100 * loss.estimate:.1f} ({100 * loss.high:.1f})",
            "-" if is_full else str(row.verdict),
            f"{measured.mean_output_tokens:.0f}",
            f"{measured.p95_output_tokens}",
            f"{measured.capped_share:.1%}",
            "-" if seconds is None else f"{seconds:.3g}",
            "-" if row.p_full is None else f"{row.p_full:.2g}",
        )
    print_plain(table)
    typer.echo(_NOTE.format(budget=f"{100 * max_loss:g} points"))
