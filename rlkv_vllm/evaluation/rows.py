"""Evaluation rows of a head profile, and the sparsity that they recommend."""

from __future__ import annotations

from collections.abc import Sequence

from rlkv_vllm.answers import Sampling
from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile
from rlkv_vllm.statistics import wilson_interval
from rlkv_vllm.tasks.measurement import Measurement

#: A sparsity is recommended if it solves this share of the problems.
GOOD_ACCURACY = 0.95


def evaluation_row(
    task: str,
    sparsity: float,
    result: Measurement,
    full: Measurement,
    *,
    seed: int,
    sampling: Sampling,
) -> EvaluationRow:
    """One row of a profile: `result` at `sparsity`, `full` with the full cache.

    Both are of the same problems, made with `seed`.
    """
    return EvaluationRow(
        task=task,
        n=result.n,
        sparsity=sparsity,
        accuracy=result.accuracy,
        full_accuracy=full.accuracy,
        mean_output_tokens=result.mean_output_tokens,
        p95_output_tokens=result.p95_output_tokens,
        capped_share=result.capped_share,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seconds_per_solved=result.seconds_per_solved,
        seed=seed,
    )


def accuracy_interval(row: EvaluationRow) -> tuple[float, float]:
    """95% Wilson interval of the accuracy of a row."""
    return wilson_interval(round(row.accuracy * row.n), row.n)


def recommended_sparsity(rows: Sequence[EvaluationRow]) -> float | None:
    """The largest sparsity that solves `GOOD_ACCURACY` of the problems in all of its rows."""
    failed = {row.sparsity for row in rows if row.accuracy < GOOD_ACCURACY}
    return max((row.sparsity for row in rows if row.sparsity not in failed), default=None)


def with_rows(profile: HeadProfile, rows: Sequence[EvaluationRow]) -> HeadProfile:
    """`profile` with `rows`, which replace those of the same task, n and sparsity.

    The recommended sparsity is that of all rows together.
    """
    new = {(row.task, row.n, row.sparsity) for row in rows}
    kept = [row for row in profile.evaluation if (row.task, row.n, row.sparsity) not in new]
    merged = [*kept, *rows]
    return profile.model_copy(
        update={"evaluation": merged, "recommended_sparsity": recommended_sparsity(merged)}
    )
