"""How often an evaluation with early stopping proves a sparsity that is beyond the budget.

Answers are planted, decisions are those of `rlkv eval --max-loss`: `sweep.run`, verdicts and
`largest_within`. Run as a script it prints the table of all scenarios::

    python -m tests.support.budget_draws --draws 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.evaluation import sweep
from rlkv_vllm.evaluation.looks import schedule
from rlkv_vllm.evaluation.record import Record, Row
from rlkv_vllm.evaluation.rows import evaluation_row
from rlkv_vllm.evaluation.splits import FULL, Ask, Split
from rlkv_vllm.profile.budget import Verdict, largest_within
from rlkv_vllm.profile.choice import ProfileChoice
from rlkv_vllm.tasks.measurement import Measurement
from tests.support.profiles import make_profile

BUDGET = 0.02
#: Just beyond a limit.
BEYOND = 1e-6


@dataclass(frozen=True)
class Scenario:
    """True curves at one sparsity, and the evaluation that is planned.

    By default nothing is lost and all is easy to prove: only what a scenario says can fail.

    Attributes:
        changed: share of answers that are correct here or with the full cache, not both.
        loss: accuracy lost.
        cut_changed, more_cut: the same for answers cut off.
        length_ratio: mean output tokens against the full cache.
        cap: length limit of an answer.
        explodes: some answers run to the limit, all of a problem together; else all get longer.
        spread: standard deviation of the logarithm of a problem's length.
        samples: answers per problem.
        agreement: chance that an answer to a problem changes, if that problem's can.
    """

    name: str
    problems: int = 1800
    changed: float = 0.0
    loss: float = 0.0
    cut_changed: float = 0.0
    more_cut: float = 0.0
    length_ratio: float = 1.0
    cap: int = 1500
    explodes: bool = False
    spread: float = 0.3
    samples: int = 1
    agreement: float = 1.0


@dataclass(frozen=True)
class Figures:
    """What the draws of a scenario gave: shares of them, and mean problems answered."""

    proven: float
    violated: float
    problems: float


SCENARIOS = [
    *(
        Scenario(f"loss just beyond, {changed:.0%} change", n, changed, BUDGET + BEYOND)
        for n in (200, 400, 1800)
        for changed in (0.021, 0.04, 0.1)
    ),
    *(
        Scenario(f"loss just beyond, 4 alike samples, {changed:.0%} change", n, changed,
                 BUDGET + BEYOND, samples=4, agreement=0.9)
        for n in (400, 1800)
        for changed in (0.021, 0.04, 0.1)
    ),
    *(
        Scenario(f"cut off just beyond, {changed:.0%} change", n, cut_changed=changed,
                 more_cut=BUDGET + BEYOND)
        for n in (400, 1800)
        for changed in (0.021, 0.04)
    ),
    *(
        Scenario(f"length just beyond, {samples} samples, spread {spread:g}", n,
                 length_ratio=1.1 + BEYOND, spread=spread, cap=8192, samples=samples)
        for n, samples in ((400, 1), (1800, 1), (400, 4))
        for spread in (0.5, 1.0, 1.5)
    ),
    *(
        Scenario(f"length just beyond, {samples} samples, some of {cap:,} tokens", n,
                 length_ratio=1.1 + BEYOND, spread=0.8, cap=cap, explodes=True, samples=samples)
        for n, samples in ((400, 1), (1800, 1), (400, 4))
        for cap in (2048, 4096, 16384)
    ),
]  # fmt: skip
#: Sparsities that lose nothing, at the number of problems that is announced for them.
GOOD = [
    Scenario(
        f"no loss, {changed:.0%} change, {samples} samples, at most {cap:,} tokens", n, changed,
        cut_changed=0.01, cap=cap, spread=0.8, samples=samples,
        agreement=0.5 if samples > 1 else 1.0,
    )
    for n, changed, samples, cap in (
        (502, 0.02, 1, 2048),
        (502, 0.02, 1, 8192),
        (1800, 0.02, 1, 8192),
        (1800, 0.04, 1, 8192),
        (1800, 0.1, 1, 8192),
        (1800, 0.1, 4, 8192),
    )
]  # fmt: skip


def _changes(
    rng: np.random.Generator, scenario: Scenario, changed: float, worse: float
) -> np.ndarray:
    """1 worse, -1 better, 0 as before; ``[problems, samples]``."""
    shape = scenario.problems, scenario.samples
    problem = rng.random((scenario.problems, 1))
    flips = rng.random(shape) < scenario.agreement
    more, less = (changed + worse) / 2, (changed - worse) / 2
    up = (problem < more / scenario.agreement) & flips
    down = (problem > 1 - less / scenario.agreement) & flips
    return up.astype(int) - down


def _scales(rng: np.random.Generator, scenario: Scenario, problems: int) -> np.ndarray:
    return 400 * np.exp(scenario.spread * rng.standard_normal((problems, 1)))


def _lengths(
    rng: np.random.Generator, scenario: Scenario, scale: np.ndarray, samples: int
) -> np.ndarray:
    found = scale * np.exp(0.4 * rng.standard_normal((len(scale), samples)))
    return np.minimum(found.round(), scenario.cap).astype(int)


@cache
def _exploding(scenario: Scenario) -> float:
    """Share of problems whose answers run to the limit, for the ratio of the scenario."""
    rng = np.random.default_rng(0)
    mean = _lengths(rng, scenario, _scales(rng, scenario, 1_000_000), 1).mean()
    return float((scenario.length_ratio - 1) / (scenario.cap / mean - 1))


def draw(scenario: Scenario, rng: np.random.Generator) -> tuple[Measurement, Measurement]:
    """Answers to all planned problems: with the full cache, and with the split one."""
    shape = scenario.problems, scenario.samples
    # No answer before is wrong and gets worse: the rest is correct as often as not.
    lost = _changes(rng, scenario, scenario.changed, scenario.loss)
    same = rng.random(shape) < 0.8
    full_correct, correct = np.where(lost, lost > 0, same), np.where(lost, lost < 0, same)
    cut = _changes(rng, scenario, scenario.cut_changed, scenario.more_cut)
    full_cut, new_cut = cut < 0, cut > 0
    scale = _scales(rng, scenario, scenario.problems)
    full_length, length = (_lengths(rng, scenario, scale, scenario.samples) for _ in range(2))
    if scenario.explodes:
        length[rng.random(scenario.problems) < _exploding(scenario)] = scenario.cap
    else:
        length = (length * scenario.length_ratio).round().astype(int)
    return tuple(  # type: ignore[return-value]
        Measurement(a.ravel().tolist(), b.ravel().tolist(), c.ravel().tolist(), 1.0, shape[1])
        for a, b, c in (
            (full_correct, full_length, full_cut),
            (correct, length, new_cut),
        )
    )


class _NoRecord(Record):
    """Keeps and writes nothing."""

    def __init__(self) -> None: ...

    def find(self, split: Split) -> None:
        return None

    def add(self, row: Row) -> Row:
        return row


class _Rows(list[Row]):
    """Keeps the rows of a sweep."""

    def on_look(self, row: Row) -> None: ...

    def on_row(self, row: Row, is_reused: bool) -> None:
        self.append(row)

    def on_left_out(self, split: Split, violated: float) -> None: ...


def _part(measured: Measurement, start: int, end: int) -> Measurement:
    places = slice(start * measured.samples, end * measured.samples)
    return Measurement(
        measured.correct[places],
        measured.output_tokens[places],
        measured.cut[places],
        1.0,
        measured.samples,
    )


@cache
def _splits(sparsities: tuple[float, ...]) -> list[Split]:
    profile = make_profile(10, 4)
    choice = ProfileChoice("p", profile, Path("p.json"), 0.0, Span(4, 16))
    return [
        Split("p" if share else FULL, replace(choice, sparsity=share))
        for share in (0.0, *sparsities)
    ]


def evaluate(
    problems: int, answers: Sequence[Measurement], sparsities: tuple[float, ...], cap: int = 1500
) -> list[Row]:
    """The rows of `rlkv eval --max-loss 2%`: `answers` of the full cache and each sparsity."""
    splits = _splits(sparsities)
    given = {split.digest: one for split, one in zip(splits, answers, strict=True)}

    @contextmanager
    def opened(split: Split) -> Iterator[Ask]:
        yield partial(_part, given[split.digest])

    rows = _Rows()
    sampling = Sampling(max_tokens=cap, temperature=0.6)
    make_row = partial(evaluation_row, "planted", seed=1, sampling=sampling)
    sweep.run(splits, opened, _NoRecord(), schedule(problems, BUDGET), make_row, rows)
    return rows


def run(scenario: Scenario, draws: int, seed: int = 0) -> Figures:
    """Evaluate as many draws of one sparsity."""
    rng = np.random.default_rng(seed)
    proven = violated = problems = 0
    for _ in range(draws):
        rows = evaluate(scenario.problems, draw(scenario, rng), (0.5,), scenario.cap)
        assessments = [row.assessment for row in rows]
        proven += largest_within(assessments, Verdict.PROVEN) == 0.5
        violated += rows[-1].verdict is Verdict.VIOLATED
        problems += rows[-1].measurement.n
    return Figures(proven / draws, violated / draws, problems / draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| true curves | planned n | proven | violated | mean n |\n|---|---|---|---|---|")
    for scenario in [*SCENARIOS, *GOOD]:
        found = run(scenario, options.draws, options.seed)
        print(
            f"| {scenario.name} | {scenario.problems:,} | {found.proven:.1%} | "
            f"{found.violated:.1%} | {found.problems:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
