"""What the evaluation rows of a profile say about an accuracy budget, as text and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.cli.tables import new_table
from rlkv_vllm.profile.budget import (
    Assessment,
    Budget,
    ContradictingRowsError,
    Verdict,
    assess_each,
    percent,
)
from rlkv_vllm.profile.evidence import Target, Within, origin, sparsity_within

if TYPE_CHECKING:
    from rich.table import Table

    from rlkv_vllm.profile.schema import HeadProfile


@dataclass(frozen=True)
class Evidence:
    """All rows of a profile with their verdicts, and what those of `target` allow."""

    profile: HeadProfile
    budget: Budget
    target: Target
    proven: Within | None
    measured: Within | None
    contradiction: str = ""

    @classmethod
    def read(cls, profile: HeadProfile, budget: Budget | None = None, tp_size: int = 1) -> Evidence:
        """Without a `budget`: the default one.

        Raises:
            RlkvError: the ranks do not fit the heads.
        """
        budget, target = budget or Budget(), Target(tp_size)
        levels = Verdict.PROVEN, Verdict.MEASURED
        try:
            proven, measured = (
                sparsity_within(profile, Budget(budget.max_loss, level), target) for level in levels
            )
        except ContradictingRowsError as error:
            return cls(profile, budget, target, None, None, str(error))
        return cls(profile, budget, target, proven, measured)

    def table(self) -> Table:
        """All rows."""
        table = new_table(
            *("task", "n", "sparsity", "accuracy", "full cache", "mean output tokens"),
            *("loss", "at most", "verdict", "measured with"),
        )
        for one in self._assessments():
            row = one.row
            table.add_row(
                row.task,
                str(row.n),
                f"{row.sparsity:g}",
                f"{row.accuracy:.3f}",
                f"{row.full_accuracy:.3f}",
                f"{row.mean_output_tokens:.1f}",
                f"{100 * one.loss.estimate:.1f}%",
                f"{100 * one.loss.high:.1f}%" if math.isfinite(one.loss.high) else "-",
                str(one.verdict) if row.sparsity else "-",
                self._measured_with(one) if row.sparsity else "-",
            )
        return table

    def sentence(self) -> str:
        """The largest sparsities within the budget."""
        if self.contradiction:
            return f"warning: {self.contradiction}"
        ranks = f" on {self.target.tp_size} ranks" if self.target.tp_size > 1 else ""
        found = {w.sparsity: w for w in (self.measured, self.proven) if w is not None}
        if not found:
            return f"no sparsity is within {percent(self.budget.max_loss)}{ranks}"
        parts = (f"sparsity {w.sparsity:g}, {w.weakest.describe()}" for w in found.values())
        return f"within {percent(self.budget.max_loss)}{ranks}: {'; '.join(parts)}"

    def short(self) -> str:
        """The best sparsity and its verdict."""
        best = self.proven or self.measured
        return f"{best.sparsity:g} {best.verdict}" if best else "-"

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "max_loss": self.budget.max_loss,
            "tensor_parallel_size": self.target.tp_size,
            "proven": self.proven and self.proven.sparsity,
            "measured": self.measured and self.measured.sparsity,
            "contradiction": self.contradiction or None,
            "rows": [
                {
                    "task": one.row.task,
                    "sparsity": one.row.sparsity,
                    "n": one.row.n,
                    "loss": one.loss.estimate,
                    "loss_bound": one.loss.high if math.isfinite(one.loss.high) else None,
                    "verdict": str(one.verdict),
                    "measured_with": self._measured_with(one),
                }
                for one in self._assessments()
            ],
        }

    def _assessments(self) -> list[Assessment]:
        return assess_each(self.profile.evaluation, self.budget.max_loss)

    def _measured_with(self, one: Assessment) -> str:
        """Flags of what a row counts for."""
        known = origin(self.profile, one.row, self.target)
        if known is None:
            return "other heads, sink or window"
        tp_size, _ = known
        ranks = "1 rank" if tp_size == 1 else f"{tp_size} ranks"
        return ", ".join(filter(None, (ranks, one.row.kv_cache_dtype)))
