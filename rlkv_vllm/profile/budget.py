"""The accuracy budget: what evaluation rows prove about the quality that a sparsity keeps.

A sparsity is within a budget if it loses at most so much accuracy, and if its answers are hardly
longer and hardly more often cut off than those with the full cache. The last two guard against
length explosion: at high sparsity answers first get longer, then wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import NormalDist

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.schema import EvaluationRow, PairedCounts
from rlkv_vllm.statistics import tango_bounds

#: Accuracy that a recommended sparsity may lose, a share of the answers.
MAX_LOSS = 0.02
#: Mean output tokens relative to the full cache, at most.
MAX_LENGTH_RATIO = 1.1
#: Answers cut off more than with the full cache, at most, a share.
MAX_MORE_CUT = 0.02
#: One-sided error level of all bounds.
LEVEL = 0.05
#: Half a pair: without it a bound fails up to 7% of the time where few answers differ.
CORRECTION = 0.5
#: Problems from which an estimate counts as measured.
ENOUGH_PROBLEMS = 200


class ContradictingRowsError(RlkvError):
    """One row proves what another one disproves."""


class Verdict(IntEnum):
    """What a row says about a budget; the higher the better.

    Proven: every bound is within the budget. Measured: every estimate is, over at least
    `ENOUGH_PROBLEMS`. Violated: a bound is beyond it. Undecided: none of them.
    """

    VIOLATED = 0
    UNDECIDED = 1
    MEASURED = 2
    PROVEN = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Budget:
    """Accuracy that may be lost, a share of the answers, and how sure that must be."""

    max_loss: float = MAX_LOSS
    evidence: Verdict = Verdict.PROVEN

    def options(self) -> dict[str, float | str]:
        """As `asked_budget` takes it, without what is the default."""
        is_proven = self.evidence is Verdict.PROVEN
        return {"max_loss": self.max_loss} | ({} if is_proven else {"evidence": str(self.evidence)})

    def flags(self) -> list[str]:
        """As a command takes it."""
        return [
            word
            for name, value in self.options().items()
            for word in (
                f"--{name.replace('_', '-')}",
                value if isinstance(value, str) else percent(value),
            )
        ]


@dataclass(frozen=True)
class Measure:
    """An estimate, its one-sided bounds (infinite: unknown), and the limit that it may not pass."""

    name: str
    estimate: float
    low: float
    high: float
    limit: float

    def verdict(self, problems: int) -> Verdict:
        """What it says; more is worse."""
        limit = self.limit + 1e-9  # shares of problems are rounded
        if max(self.estimate, self.high) <= limit:
            return Verdict.PROVEN
        if self.low > limit:
            return Verdict.VIOLATED
        is_within = self.estimate <= limit and problems >= ENOUGH_PROBLEMS
        return Verdict.MEASURED if is_within else Verdict.UNDECIDED


@dataclass(frozen=True)
class Assessment:
    """What one row says about a budget; `measures` are loss, length ratio and more cut off."""

    row: EvaluationRow
    measures: tuple[Measure, ...]

    @property
    def verdict(self) -> Verdict:
        if self.row.sparsity == 0:  # the full cache itself
            return Verdict.PROVEN
        # A row of an older file does not say which heads were measured.
        most = Verdict.MEASURED if self.row.allocation is None else Verdict.PROVEN
        return min(most, *(measure.verdict(self.row.n) for measure in self.measures))

    @property
    def loss(self) -> Measure:
        """Accuracy lost against the full cache, a share."""
        return self.measures[0]

    def describe(self) -> str:
        """In words: verdict, loss, what decided if that is another measure, what was asked."""
        text = f"{self.verdict}: loses {100 * self.loss.estimate:.1f} points"
        if math.isfinite(self.loss.high):
            text += f", at most {100 * self.loss.high:.1f}"
        for measure in self.measures[1:]:
            if measure.verdict(self.row.n) < self.loss.verdict(self.row.n):
                text += f", {measure.name} {measure.estimate:.3g} of {measure.limit:g} allowed"
        text += f", n {self.row.n}, task {one_line(self.row.task, 60)}"
        if (temperature := self.row.temperature) is None:
            return text
        return f"{text}, {f'temperature {temperature:g}' if temperature else 'greedy'}"


def assess(
    row: EvaluationRow, max_loss: float = MAX_LOSS, full: EvaluationRow | None = None
) -> Assessment:
    """Compare a row with a budget.

    Args:
        row: of any sparsity.
        max_loss: accuracy that may be lost, a share.
        full: the row of the full cache, for rows of older files that do not carry its figures.
    """
    full_tokens, full_cut = row.full_mean_output_tokens, row.full_capped_share
    if full is not None:
        full_tokens = full.mean_output_tokens if full_tokens is None else full_tokens
        full_cut = full.capped_share if full_cut is None else full_cut
    paired, samples = row.paired, row.samples or 1
    loss = row.full_accuracy - row.accuracy
    ratio = row.mean_output_tokens / full_tokens if full_tokens else math.inf
    known = row.capped_share is not None and full_cut is not None
    more_cut = (row.capped_share or 0) - (full_cut or 0) if known else math.inf
    unknown = (-math.inf, math.inf)
    loss_bounds = cut_bounds = ratio_bounds = unknown
    if paired is not None:
        # Unknown: the answers to a problem count as one.
        effect, cut_effect = paired.design_effect or samples, paired.cut_design_effect or samples
        answers = row.n * samples
        loss_bounds = _bounds(paired, paired.lost, paired.gained, effect, answers)
        cut_bounds = _bounds(paired, paired.newly_cut, paired.no_longer_cut, cut_effect, answers)
        if paired.tokens_error is not None and math.isfinite(ratio):
            away = NormalDist().inv_cdf(1 - (paired.level or LEVEL)) * paired.tokens_error
            ratio_bounds = ratio * math.exp(-away), ratio * math.exp(away)
    return Assessment(
        row,
        (
            Measure("loss", loss, *loss_bounds, max_loss),
            Measure("length ratio", ratio, *ratio_bounds, MAX_LENGTH_RATIO),
            Measure("more cut off", more_cut, *cut_bounds, MAX_MORE_CUT),
        ),
    )


def assess_each(rows: Iterable[EvaluationRow], max_loss: float = MAX_LOSS) -> list[Assessment]:
    """An assessment of every row, in their order."""
    rows = list(rows)
    full = {conditions(row): row for row in rows if row.sparsity == 0}
    return [assess(row, max_loss, full.get(conditions(row))) for row in rows]


def assess_rows(rows: Iterable[EvaluationRow], max_loss: float = MAX_LOSS) -> list[Assessment]:
    """One assessment per task, sampling and sparsity, in this order.

    All `rows` are of one allocation per sparsity. Of several rows the one with most answers
    counts, of equal ones the worst.

    Raises:
        ContradictingRowsError: one row proves what another one disproves.
    """
    groups: dict[tuple[object, ...], dict[float, list[Assessment]]] = {}
    for one in assess_each(rows, max_loss):
        groups.setdefault(conditions(one.row), {}).setdefault(one.row.sparsity, []).append(one)
    found: list[Assessment] = []
    for by_sparsity in groups.values():
        for sparsity, same in sorted(by_sparsity.items()):
            verdicts = {one.verdict: one for one in same}
            if Verdict.PROVEN in verdicts and Verdict.VIOLATED in verdicts:
                proven, violated = verdicts[Verdict.PROVEN].row, verdicts[Verdict.VIOLATED].row
                raise ContradictingRowsError(
                    f"rows of task {one_line(proven.task, 60)} at sparsity {sparsity:g} contradict "
                    f"each other: n {proven.n}, seed {proven.seed} proves the budget, n "
                    f"{violated.n}, seed {violated.seed} violates it: remove the wrong row from "
                    "the profile's `evaluation`, or measure again with `rlkv eval --write-rows`"
                )
            found.append(max(same, key=_weight))
    return found


def _weight(one: Assessment) -> tuple[float, ...]:
    """Of rows that measure the same, the highest counts: no other seed buys a better verdict."""
    return one.row.n * (one.row.samples or 1), -one.verdict, one.loss.high, one.loss.estimate


def conditions(row: EvaluationRow) -> tuple[object, ...]:
    """What was asked and how answers were sampled: rows that share it measure the same."""
    return (
        row.task, row.max_tokens, row.temperature, row.top_p, row.top_k, row.min_p,
        row.repetition_penalty, cache_dtype(row.kv_cache_dtype),
    )  # fmt: skip


def largest_within(
    assessments: Sequence[Assessment], evidence: Verdict = Verdict.MEASURED
) -> float | None:
    """The largest sparsity that is within the budget together with all smaller measured ones.

    It must have been measured on every task and with every sampling that the rows have, and hold
    in all of them. None: there is no such sparsity above 0.
    """
    measured = [one for one in assessments if one.row.sparsity > 0]
    failed = [one.row.sparsity for one in measured if one.verdict < evidence]
    first_failed = min(failed, default=math.inf)
    every = {conditions(one.row) for one in measured}
    best = None
    for sparsity in sorted({one.row.sparsity for one in measured}):
        here = {conditions(one.row) for one in measured if one.row.sparsity == sparsity}
        if sparsity < first_failed and here == every:
            best = sparsity
    return best


def cache_dtype(name: str | None) -> str | None:
    """One name for a type of the KV cache, as vLLM names them; None: the model's own.

    An engine refuses types that are neither the model's own nor quantised.
    """
    if name in (None, "auto", "float16", "bfloat16"):
        return None
    return "fp8_e4m3" if name == "fp8" else name


def asked_budget(
    max_loss: float | str | None, evidence: str | None, sparsity: float | None
) -> Budget | None:
    """The budget that was asked for with `--max-loss` and `--evidence`; None: none.

    Raises:
        RlkvError: one of them is out of range, or does not go with the others.
    """
    if max_loss is None:
        if evidence is not None:
            raise RlkvError(
                f"--evidence {one_line(evidence, 40)}: says how sure --max-loss must be: give "
                "--max-loss too, e.g. --max-loss 1%"
            )
        return None
    loss = parse_loss("--max-loss", max_loss)
    if sparsity is not None:
        raise RlkvError(
            f"--max-loss {percent(loss)} chooses the sparsity, and --sparsity {sparsity:g} gives "
            "one: remove one of them"
        )
    allowed = {str(verdict): verdict for verdict in (Verdict.PROVEN, Verdict.MEASURED)}
    if (evidence or "proven") not in allowed:
        raise RlkvError(f"--evidence {one_line(evidence, 40)}: must be proven or measured")
    return Budget(loss, allowed[evidence or "proven"])


def parse_loss(flag: str, given: str | float) -> float:
    """A budget such as ``1%`` or ``0.01``, above 0 and below 1."""
    number = str(given).strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        meant = f"{value:g}%" if 1 <= value < 100 and not number.endswith("%") else ""
        raise RlkvError(
            f"{flag} {one_line(given, 40)}: must be a share of the answers above 0% and below "
            f"100%, e.g. 1% or 0.01{f': did you mean {meant}?' if meant else ''}"
        )
    return value


def percent(share: float) -> str:
    """A budget as `parse_loss` reads it, e.g. ``1%``."""
    return f"{100 * share:.10g}%"


def _bounds(
    paired: PairedCounts, worse: int, better: int, effect: float, answers: int
) -> tuple[float, float]:
    """One-sided bounds of the share by which `worse` exceeds `better`."""
    level = paired.level or LEVEL
    return tango_bounds(worse / effect, better / effect, answers / effect, level, CORRECTION)
