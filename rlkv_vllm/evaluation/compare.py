"""Scorers against each other: the same problems, several seeds per scorer, paired tests."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.measurement import Measurement
from rlkv_vllm.evaluation.splits import FULL, STREAMING
from rlkv_vllm.statistics import mcnemar_p

Gates = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """The answers to all problems with the gates of one profile at one sparsity.

    Attributes:
        base: the base model; outcomes are paired within it.
        label: the scorer, or `FULL` or `STREAMING`.
        run: which of the label's profiles, from 0.
        sparsity: share of streaming heads.
        measurement: how the problems were answered.
    """

    base: str
    label: str
    run: int
    sparsity: float
    measurement: Measurement


@dataclass(frozen=True)
class Row:
    """One line of the table: a label at a sparsity, all base models and seeds together.

    Attributes:
        label: the scorer.
        sparsity: share of streaming heads.
        accuracy: mean over the runs.
        runs: accuracy of every run, base after base.
        minus_full: `accuracy` minus that of the full cache on the same base models.
        p: exact McNemar test against the reference label, all pairs of runs pooled; None for the
            reference itself and the baselines.
        p_problems: the same question with one value per problem; see `sign_flip_p`.
        mean_output_tokens: mean length of the answers (tokens).
        capped_share: share of the answers that the length cap cut off.
    """

    label: str
    sparsity: float
    accuracy: float
    runs: tuple[float, ...]
    minus_full: float
    p: float | None
    p_problems: float | None
    mean_output_tokens: float
    capped_share: float


def compare(outcomes: Sequence[Outcome], against: str | None = None) -> list[Row]:
    """The table: the full cache, every label at every sparsity, all streaming.

    Args:
        outcomes: of every base model the same labels, sparsities and number of problems.
        against: the label that all others are tested against.

    Raises:
        RlkvError: if `against` is not among the labels, or base models differ in what was
            measured.
    """
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.label, outcome.sparsity), []).append(outcome)
    labels = list(dict.fromkeys(label for label, _ in groups if label not in (FULL, STREAMING)))
    if against is not None and against not in labels:
        raise RlkvError(f"--against {against}: no such label: choose from {', '.join(labels)}")
    bases = list(dict.fromkeys(outcome.base for outcome in outcomes))
    for (label, sparsity), group in groups.items():
        missing = [base for base in bases if base not in {outcome.base for outcome in group}]
        if missing:
            raise RlkvError(
                f"{label} at sparsity {sparsity:g} was not measured on {', '.join(missing)}: run "
                "it there too"
            )
    full = {outcome.base: outcome.measurement.accuracy for outcome in groups[FULL, 0.0]}
    rows = []
    for label, sparsity in _ordered(groups, labels):
        group = groups[label, sparsity]
        reference = groups.get((against, sparsity)) if against else None
        tested = reference is not None and label not in (against, FULL, STREAMING)
        measured = [outcome.measurement for outcome in group]
        accuracy = statistics.fmean(m.accuracy for m in measured)
        rows.append(
            Row(
                label=label,
                sparsity=sparsity,
                accuracy=accuracy,
                runs=tuple(m.accuracy for m in measured),
                minus_full=accuracy - statistics.fmean(full[outcome.base] for outcome in group),
                p=pooled_mcnemar_p(group, reference) if tested and reference else None,
                p_problems=sign_flip_p(group, reference) if tested and reference else None,
                mean_output_tokens=statistics.fmean(m.mean_output_tokens for m in measured),
                capped_share=statistics.fmean(m.capped_share for m in measured),
            )
        )
    return rows


def _ordered(
    groups: Mapping[tuple[str, float], Any], labels: Sequence[str]
) -> list[tuple[str, float]]:
    """Baselines at the ends; between them by sparsity, labels as they were given."""
    places = {FULL: -1, **{label: i for i, label in enumerate(labels)}, STREAMING: len(labels)}
    return sorted(groups, key=lambda key: (key[1], places[key[0]]))


def pooled_mcnemar_p(first: Sequence[Outcome], second: Sequence[Outcome]) -> float:
    """Exact McNemar test with the pairs of all base models and runs in one table.

    Run 0 is paired with run 0 and so on; a label with a single run is paired with every run of
    the other. Pooled pairs count as independent, which runs on the same problems are not, so the
    value is too small rather than too large; `sign_flip_p` does not have this flaw.

    Raises:
        RlkvError: if the numbers of runs do not fit.
    """
    solved: tuple[list[bool], list[bool]] = ([], [])
    for ours, theirs in _by_base(first, second):
        count = max(len(ours), len(theirs))
        if {len(ours), len(theirs)} - {1, count}:
            raise RlkvError(
                f"{first[0].label} has {len(ours)} profiles and {second[0].label} {len(theirs)}: "
                "give as many of each, or one"
            )
        for i in range(count):
            solved[0].extend(ours[i % len(ours)].measurement.correct)
            solved[1].extend(theirs[i % len(theirs)].measurement.correct)
    return mcnemar_p(*solved)


def sign_flip_p(
    first: Sequence[Outcome], second: Sequence[Outcome], *, resamples: int = 9999
) -> float:
    """Two-sided permutation test with one difference per problem: the means over the runs.

    Under the null hypothesis each difference is as likely with the other sign. Runs on the same
    problem count once, whatever their number.

    Args:
        first: runs of one label.
        second: runs of another on the same problems.
        resamples: random sign patterns where all of them would be too many.
    """
    import numpy as np
    from scipy.stats import permutation_test

    pieces = []
    for ours, theirs in _by_base(first, second):
        means = [
            np.mean([outcome.measurement.correct for outcome in runs], axis=0)
            for runs in (ours, theirs)
        ]
        pieces.append(means[0] - means[1])
    differences = np.concatenate(pieces)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    result = permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _by_base(
    first: Sequence[Outcome], second: Sequence[Outcome]
) -> list[tuple[list[Outcome], list[Outcome]]]:
    bases = dict.fromkeys(outcome.base for outcome in first)
    return [
        ([o for o in first if o.base == base], [o for o in second if o.base == base])
        for base in bases
    ]


def rank_agreement(runs: Sequence[Gates]) -> float | None:
    """Spearman's rank correlation of the gates of several runs, mean over all pairs of runs.

    Args:
        runs: gates ``[layers][KV heads]`` of the same model.

    Returns:
        None if there is no pair, or the gates of a run are all equal.
    """
    import numpy as np
    from scipy.stats import spearmanr

    flat = [np.concatenate([np.asarray(row, float) for row in gates]) for gates in runs]
    if len(flat) < 2 or any((gates == gates[0]).all() for gates in flat):
        return None
    found = [spearmanr(one, other).statistic for one, other in combinations(flat, 2)]
    return float(statistics.fmean(found))


def markdown(
    rows: Sequence[Row], agreement: Mapping[str, float | None], against: str | None
) -> str:
    """The table as Markdown.

    Args:
        rows: as `compare` makes them.
        agreement: `rank_agreement` by label.
        against: the reference label.
    """
    name = against or "-"
    lines = [
        "| sparsity | gates | accuracy | each run | minus full | "
        f"p vs {name} | p vs {name}, per problem | output tokens | cut off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row.sparsity:g}",
            row.label,
            f"{row.accuracy:.3f}",
            " ".join(f"{share:.3f}" for share in row.runs),
            f"{row.minus_full:+.3f}",
            _p(row.p),
            _p(row.p_problems),
            f"{row.mean_output_tokens:.1f}",
            f"{row.capped_share:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| gates | rank agreement of runs (Spearman) |", "|---|---|"]
    for label, value in agreement.items():
        lines.append(f"| {label} | {'-' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines) + "\n"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
