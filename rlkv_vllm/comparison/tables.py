"""The figures of a comparison, out of the content of its record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlkv_vllm.comparison.record import RunRow
from rlkv_vllm.evaluation.splits import FULL
from rlkv_vllm.evaluation.stored import StoredAnswers
from rlkv_vllm.profile.budget import CORRECTION
from rlkv_vllm.statistics import design_effect, sign_flip_p, tango_bounds, wilson_interval
from rlkv_vllm.tasks.measurement import Measurement

#: A difference is called one if its p-value is at most this.
LEVEL = 0.05


@dataclass(frozen=True)
class Figures:
    """A method on a model at a sparsity, over its seeds.

    Attributes:
        method: its label, or that of the full cache.
        by_seed: accuracy of each seed.
        interval: 95% interval of the mean accuracy; answers to one problem count as a cluster.
        mean_output_tokens: over all answers.
        capped_share: of all answers, those cut off.
        agreement: share of full heads that two seeds have in common, mean over the pairs; None
            with a single profile.
    """

    method: str
    by_seed: Sequence[float]
    interval: tuple[float, float]
    mean_output_tokens: float
    capped_share: float
    agreement: float | None

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.by_seed)


@dataclass(frozen=True)
class Comparison:
    """The reference against another method: answers to the same problems, seed by seed.

    Attributes:
        method: the other one.
        difference: accuracy of the reference minus that of the other method.
        low: one-sided 95% bound of the difference: it is at least this.
        high: as `low`: it is at most this.
        p: of the exact two-sided permutation test over the problems.
        seeds: number of pairs of profiles.
    """

    method: str
    difference: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def outcome(self) -> str:
        """How the reference does: win, tie or loss."""
        if self.p > LEVEL or self.difference == 0:
            return "tie"
        return "win" if self.difference > 0 else "loss"


@dataclass(frozen=True)
class CostRow:
    """What a profile of a method costs: means, least and greatest over the seeds; None: unknown."""

    method: str
    cpu_seconds: tuple[float, float, float] | None
    seconds: tuple[float, float, float] | None


@dataclass(frozen=True)
class Panel:
    """A model at a sparsity: the full cache first, then the methods that are measured."""

    sparsity: float
    rows: Sequence[Figures]
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class ModelTables:
    """All tables of a model.

    `n` are the fresh problems, without the `dropped` ones that a profile was made from.
    """

    label: str
    n: int
    dropped: int
    panels: Sequence[Panel]
    costs: Sequence[CostRow]


def tables(content: Mapping[str, Any]) -> list[ModelTables]:
    """The tables of every model that was asked for and has answers with the full cache."""
    asked, found = content["asked"], content["models"]
    return [
        _model_tables(label, found[label], asked)
        for label in asked["models"]
        if found[label]["settings"]["full_cache"] in found[label]["answers"]
    ]


def _model_tables(label: str, entry: Mapping[str, Any], asked: Mapping[str, Any]) -> ModelTables:
    seeds = [None, *asked["seeds"]]
    runs = {
        method: sorted(
            (r for r in entry["runs"] if r["method"] == method and r["seed"] in seeds),
            key=lambda run: seeds.index(run["seed"]),
        )
        for method in asked["methods"]
    }
    answers = {
        digest: StoredAnswers.model_validate(raw).measurement()
        for digest, raw in entry["answers"].items()
    }
    full = answers[entry["settings"]["full_cache"]]
    seen = {place for of_method in runs.values() for run in of_method for place in run["seen"]}
    kept = [place for place in range(full.n) if place not in seen]
    if kept:
        answers = {digest: _only(measured, kept) for digest, measured in answers.items()}
        full = answers[entry["settings"]["full_cache"]]
    panels = []
    for sparsity in asked["sparsities"]:
        share = f"{sparsity:g}"
        done = {
            method: [run for run in of_method if run["digests"].get(share) in answers]
            for method, of_method in runs.items()
        }
        measured = {
            method: {run["seed"]: answers[run["digests"][share]] for run in of_method}
            for method, of_method in done.items()
            if of_method
        }
        rows = [_figures(FULL, [full], [])]
        rows += [
            _figures(
                method, [*by_seed.values()], [run["full_heads"][share] for run in done[method]]
            )
            for method, by_seed in measured.items()
        ]
        reference = measured.get(asked["reference"], {})
        comparisons = [
            _compared(method, reference, by_seed)
            for method, by_seed in measured.items()
            if method != asked["reference"]
        ]
        panels.append(Panel(sparsity, rows, [one for one in comparisons if one]))
    costs = [_cost(method, of_method) for method, of_method in runs.items()]
    return ModelTables(label, len(kept), len(seen), panels, costs)


def _only(measured: Measurement, problems: Sequence[int]) -> Measurement:
    size = measured.samples
    places = [problem * size + sample for problem in problems for sample in range(size)]
    return Measurement(
        correct=[measured.correct[place] for place in places],
        output_tokens=[measured.output_tokens[place] for place in places],
        cut=[measured.cut[place] for place in places],
        samples=size,
    )


def _figures(
    method: str, measured: Sequence[Measurement], full_heads: Sequence[Sequence[Sequence[int]]]
) -> Figures:
    bits = _by_problem([one.correct for one in measured], measured[0].samples)
    size = measured[0].samples * len(measured)
    effect = design_effect(bits, size) if size > 1 else 1.0
    return Figures(
        method=method,
        by_seed=[one.accuracy for one in measured],
        interval=wilson_interval(sum(bits) / effect, len(bits) / effect),
        mean_output_tokens=statistics.mean(one.mean_output_tokens for one in measured),
        capped_share=statistics.mean(one.capped_share for one in measured),
        agreement=_agreement(full_heads),
    )


def _by_problem(rows: Sequence[Sequence[int]], samples: int) -> list[int]:
    """The values of all answers to a problem in a row, first those of the first of `rows`."""
    starts = range(0, len(rows[0]), samples)
    return [int(x) for start in starts for row in rows for x in row[start : start + samples]]


def _agreement(full_heads: Sequence[Sequence[Sequence[int]]]) -> float | None:
    kept = [
        {(layer, head) for layer, heads in enumerate(layers) for head in heads}
        for layers in full_heads
    ]
    shares = [len(a & b) / len(a) if a else 1.0 for a, b in combinations(kept, 2)]
    return statistics.mean(shares) if shares else None


def _compared(
    method: str,
    reference: Mapping[int | None, Measurement],
    other: Mapping[int | None, Measurement],
) -> Comparison | None:
    """The reference against a method, profiles of one seed paired; None: no seed has both."""
    if None in reference and None not in other:
        reference = dict.fromkeys(other, reference[None])
    if None in other and None not in reference:
        other = dict.fromkeys(reference, other[None])
    pairs = [(reference[seed], other[seed]) for seed in reference if seed in other]
    if not pairs:
        return None
    rows = [[int(x) - int(y) for x, y in zip(a.correct, b.correct, strict=True)] for a, b in pairs]
    samples = pairs[0][0].samples
    differences, size = _by_problem(rows, samples), samples * len(pairs)
    effect = design_effect(differences, size) if size > 1 else 1.0
    counts = differences.count(1), differences.count(-1), len(differences)
    gained, lost, answers = (count / effect for count in counts)
    low, high = tango_bounds(gained, lost, answers, LEVEL, CORRECTION)
    starts = range(0, len(differences), size)
    return Comparison(
        method=method,
        difference=sum(differences) / len(differences),
        low=low,
        high=high,
        p=sign_flip_p([sum(differences[start : start + size]) for start in starts]),
        seeds=len(pairs),
    )


def _cost(method: str, runs: Sequence[RunRow]) -> CostRow:
    def over_seeds(name: str) -> tuple[float, float, float] | None:
        known = [run[name] for run in runs if run.get(name) is not None]
        return (statistics.mean(known), min(known), max(known)) if known else None

    return CostRow(method, over_seeds("cpu_seconds"), over_seeds("seconds"))
