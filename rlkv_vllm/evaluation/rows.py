"""Evaluation rows of a head profile, and the sparsity that they recommend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlkv_vllm.answers import Sampling
from rlkv_vllm.profile.budget import LEVEL, ContradictingRowsError, conditions, largest_within
from rlkv_vllm.profile.evidence import assess_profile
from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile, PairedCounts
from rlkv_vllm.statistics import design_effect, log_ratio_error, wilson_interval
from rlkv_vllm.tasks.measurement import Measurement


def evaluation_row(
    task: str,
    sparsity: float,
    result: Measurement,
    full: Measurement,
    *,
    seed: int,
    sampling: Sampling,
    allocation: str | None = None,
    kv_cache_dtype: str | None = None,
    level: float = LEVEL,
) -> EvaluationRow:
    """One row of a profile: `result` at `sparsity`, `full` with the full cache.

    Both answer the same problems, made with `seed`; `full` may have answered more, of which the
    first ones count. `allocation` is the digest of full heads, sink and window; `level` the
    one-sided error level of bounds, if the measurement could stop early.
    """
    full = full.first(result.n)
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
        top_p=sampling.top_p if sampling.top_p < 1 else None,
        top_k=sampling.top_k or None,
        min_p=sampling.min_p or None,
        repetition_penalty=(
            None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
        ),
        samples=result.samples if result.samples > 1 else None,
        seconds_per_solved=result.seconds_per_solved,
        seed=seed,
        full_mean_output_tokens=full.mean_output_tokens,
        full_capped_share=full.capped_share,
        kv_cache_dtype=kv_cache_dtype,
        allocation=allocation,
        paired=compare(result, full, level, sampling.max_tokens),
    )


def compare(
    result: Measurement, full: Measurement, level: float = LEVEL, max_tokens: int | None = None
) -> PairedCounts:
    """How the answers of `result` differ from those of `full` to the same problems.

    `max_tokens` limits an answer: the error of the lengths allows for rare answers of this length.
    """
    samples = result.samples
    correct = [int(a) - int(b) for a, b in zip(result.correct, full.correct, strict=True)]
    cut = [int(a) - int(b) for a, b in zip(result.cut, full.cut, strict=True)]
    error = log_ratio_error(
        result.tokens_per_problem,
        full.tokens_per_problem,
        None if max_tokens is None else samples * max_tokens,
        level,
    )
    return PairedCounts(
        gained=correct.count(1),
        lost=correct.count(-1),
        newly_cut=cut.count(1),
        no_longer_cut=cut.count(-1),
        tokens_error=error if math.isfinite(error) else None,
        design_effect=design_effect(correct, samples) if samples > 1 else None,
        cut_design_effect=design_effect(cut, samples) if samples > 1 else None,
        level=None if level == LEVEL else level,
    )


def accuracy_interval(row: EvaluationRow) -> tuple[float, float]:
    """95% Wilson interval of the accuracy of a row."""
    return wilson_interval(row.accuracy * row.n, row.n)


def recommended_sparsity(profile: HeadProfile) -> float | None:
    """The largest sparsity whose rows are within the default budget, estimates being enough.

    Only rows of what a single rank serves count, with the KV cache in the model's own type. None:
    there is none above 0, or one row proves what another one disproves.
    """
    try:
        return largest_within(assess_profile(profile))
    except ContradictingRowsError:  # not a reason to lose rows that were just measured
        return None


def with_rows(profile: HeadProfile, rows: Sequence[EvaluationRow]) -> HeadProfile:
    """`profile` with `rows`, which replace those of the same measurement.

    That is: same task, problems, sampling, KV cache type, sparsity and allocation. The recommended
    sparsity is that of all rows together.
    """
    new = {_measurement(row) for row in rows}
    kept = [row for row in profile.evaluation if _measurement(row) not in new]
    merged = profile.model_copy(update={"evaluation": [*kept, *rows]})
    return merged.model_copy(update={"recommended_sparsity": recommended_sparsity(merged)})


def _measurement(row: EvaluationRow) -> tuple[object, ...]:
    return (*conditions(row), row.n, row.seed, row.samples, row.sparsity, row.allocation)
