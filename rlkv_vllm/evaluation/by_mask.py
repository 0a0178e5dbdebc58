"""Accuracy against sparsity by attention masks: without vLLM, on any number of planned ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.rows import evaluation_row
from rlkv_vllm.evaluation.splits import SEEDS, Ask, Split
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.tasks import Problem, Task
from rlkv_vllm.tasks.measurement import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Report(Protocol):
    """Hears of progress; `state` has the newest figures in words, where there are some."""

    def __call__(self, stage: str, done: int, total: int, state: str = "") -> None: ...


def fresh_problems(
    task: Task, wanted: int, seed: int, used: Sequence[Problem], flags: str
) -> list[Problem]:
    """Up to `wanted` problems of `seed`, none of them among those the gates were made from.

    Raises:
        RlkvError: if none is left; it names `flags`, the options to change.
    """
    left = [problem for problem in task.problems(wanted, seed) if problem not in used]
    if wanted and not left:
        raise RlkvError(
            f"task {task.name}: no problem is left for the evaluation: change {flags}, or add "
            "problems"
        )
    return left


@contextmanager
def opened(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    split: Split,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    samples: int = 1,
    batch_size: int = 64,
    report: Report = lambda *_: None,
) -> Iterator[Ask]:
    """A loaded, ungated model that answers parts of `problems` with one split of its cache."""
    model, tokenizer = loaded
    full = split.allocation.full
    heads = HeadSplit(full, *split.span) if split.sparsity else None

    def ask(start: int, end: int) -> Measurement:
        # Random numbers of its own for every part.
        seed = sampling.seed * SEEDS + start
        found = solve(
            model,
            tokenizer,
            task,
            problems[start:end],
            split=heads,
            sampling=sampling.model_copy(update={"seed": seed}),
            samples=samples,
            batch_size=batch_size,
            report=partial(report, f"{split.label}, sparsity {split.sparsity:g}"),
        )
        return replace(found, answers=())  # not timed: masks say nothing of a served model

    yield ask


def measure_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    gates: Sequence[Sequence[float]],
    *,
    sink: int,
    window: int,
    sparsities: Sequence[float],
    sampling: Sampling,
    samples: int = 1,
    batch_size: int,
    seed: int,
    report: Report,
) -> Iterator[EvaluationRow]:
    """Solve `problems` at every sparsity, 0 included, in ascending order.

    The model is ungated; `gates` are ``[layers][KV heads]``; `problems`, at least one, were made
    with `seed` and get `samples` answers each. Yields a row as soon as it is measured, and reports
    after every batch.
    """
    full = None
    for sparsity in sorted({0.0, *sparsities}):
        allocation = allocate(gates, sparsity)
        split = HeadSplit(allocation.full, sink, window) if sparsity else None
        result = solve(
            model,
            tokenizer,
            task,
            problems,
            split=split,
            sampling=sampling,
            samples=samples,
            batch_size=batch_size,
            report=partial(report, f"sparsity {sparsity:g}"),
        )
        full = full or result
        yield evaluation_row(
            task.name,
            sparsity,
            result,
            full,
            seed=seed,
            sampling=sampling,
            allocation=allocation.digest(sink, window),
        )
