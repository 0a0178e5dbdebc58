"""Evaluation rows of a head profile, and the sparsity that they recommend."""

from __future__ import annotations

from collections.abc import Sequence

from rlkv_vllm.evaluation.measurement import Result
from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile

#: A sparsity is recommended if it solves this share of the problems.
GOOD_ACCURACY = 0.95


def evaluation_row(
    task: str,
    n: int,
    sparsity: float,
    result: Result,
    full: Result,
    *,
    seed: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seconds_per_solved: float | None = None,
) -> EvaluationRow:
    """One row of a profile.

    Args:
        task: name of the task.
        n: problems.
        sparsity: share of streaming KV heads.
        result: of the answers at that sparsity.
        full: of the answers to the same problems with the full cache.
        seed: of the problems.
        max_tokens: length cap of an answer.
        temperature: of the sampling, 0 for greedy.
        seconds_per_solved: wall time of the run per solved problem.
    """
    return EvaluationRow(
        task=task,
        n=n,
        sparsity=sparsity,
        accuracy=result.accuracy,
        full_accuracy=full.accuracy,
        mean_output_tokens=result.mean_output_tokens,
        p95_output_tokens=result.p95_output_tokens,
        capped_share=result.capped_share,
        max_tokens=max_tokens,
        temperature=temperature,
        seconds_per_solved=seconds_per_solved,
        seed=seed,
    )


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
