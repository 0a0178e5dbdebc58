"""Answers by mask with every allocation of a model that is compared, each once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rlkv_vllm.answers import Sampling
from rlkv_vllm.comparison.record import Record
from rlkv_vllm.evaluation.by_mask import Report
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.tasks import Problem, Task
from rlkv_vllm.tasks.measurement import Measurement

#: Answers all problems with really split heads; None: with the full cache. Reports as `solve`.
Answers = Callable[[HeadSplit | None, Callable[[int, int, str], None]], Measurement]


def load_answers(
    model: str,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    samples: int,
    batch_size: int,
) -> Answers:
    """Load a model that answers `problems`, by mask in transformers."""
    loaded, tokenizer, _ = load_model(model)

    def answers(split: HeadSplit | None, report: Callable[[int, int, str], None]) -> Measurement:
        return solve(
            loaded,
            tokenizer,
            task,
            problems,
            split=split,
            sampling=sampling,
            samples=samples,
            batch_size=batch_size,
            report=report,
        )

    return answers


def measure(
    model: str,
    wanted: Mapping[str, tuple[str, HeadSplit | None]],
    record: Record,
    load: Callable[[], Answers],
    report: Report,
) -> None:
    """Measure the allocations in `wanted` that the record of `model` lacks.

    `wanted` has by digest what the allocation is called and the split itself. The model is loaded
    if there is something to do.
    """
    missing = [digest for digest in wanted if record.find(model, digest) is None]
    if not missing:
        return
    answers = load()
    began = time.monotonic()
    for place, digest in enumerate(missing):
        name, split = wanted[digest]

        def on_batch(
            done: int, total: int, state: str, place: int = place, name: str = name
        ) -> None:
            share = (place + done / total) / len(missing)
            left = (time.monotonic() - began) * (1 / share - 1)
            report(
                f"{model}: answers",
                place * total + done,
                len(missing) * total,
                f"{name}: {state}, about {left / 60:.0f} min left",
            )

        before = time.monotonic()
        measured = answers(split, on_batch)
        seconds = time.monotonic() - before
        record.add(model, digest, replace(measured, seconds=seconds, answers=()))
