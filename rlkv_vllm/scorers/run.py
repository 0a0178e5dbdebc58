"""One run of a scorer: the model's own correct answers, gates, evaluation, head profile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import check_sparsity
from rlkv_vllm.allocation.span import SERVING_SPAN, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.evaluation.splits import SEEDS
from rlkv_vllm.evaluation.sweep import settings_of
from rlkv_vllm.files import one_line
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.hf.own_answers import write_answers
from rlkv_vllm.models import (
    choose_sampling,
    default_span,
    load_model_fingerprint,
    model_source,
)
from rlkv_vllm.options import job_versions
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.scorers import get_scorer
from rlkv_vllm.scorers.scorer import ScoringInput
from rlkv_vllm.store import Store
from rlkv_vllm.tasks import get_task, skip_note

#: Of the file beside a profile that holds what was computed for it so far.
WORK_FORMAT = "rlkv score 1"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `rlkv score`, whose help describes them; all of them go into the provenance.

    `settings` are those of the scorer, in place of its defaults. Sampling parameters that are None
    are those of the model.
    """

    model: str
    method: str = "greedy"
    task: str = "embedded"
    n: int = 128
    seed: int = 0
    sink: int | None = None
    window: int | None = None
    evaluate: int = 0
    sparsities: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    samples: int = 1
    batch_size: int = 64
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def make_profile(
    config: ScoreConfig,
    report: Report = lambda *_: None,
    say: Callable[[str], None] = lambda text: None,
    *,
    work: Path | None = None,
    fresh: bool = False,
) -> HeadProfile:
    """Score the heads of a model.

    Answers, and evaluations of scorers that keep them, are written to the file `work` as they
    come. If it exists, the run continues from it, unless `fresh`. The caller may remove it when
    the profile is saved.

    Raises:
        RlkvError: if an option is out of range, the model cannot be loaded or gated, it answers
            none of the problems correctly, or `work` is of other settings.
    """
    _check(config)
    scorer = get_scorer(config.method)
    settings = scorer.settings(config.settings)
    task = get_task(config.task)
    if note := skip_note(task):
        say(note)
    asked = task.problems(config.n, config.seed)
    problems = fresh_problems(task, config.evaluate, config.seed + 1, asked, "--n or --evaluate")
    sink, window = resolve_span(
        config.sink, config.window, default_span(config.model, SERVING_SPAN)
    )
    sampling, why = choose_sampling(
        config.model,
        {name: getattr(config, name) for name in _SAMPLING},
        max_tokens=config.max_new_tokens,
        seed=config.seed * SEEDS % 2**31,
        samples=config.samples,
        revision=config.revision,
    )
    fingerprint = load_model_fingerprint(config.model, config.revision)
    content: dict[str, Any] = {}
    save: Callable[[], None] = lambda: None  # noqa: E731
    if work is not None:
        store = Store(
            work,
            WORK_FORMAT,
            settings_of(
                fingerprint,
                model_source(config.model),
                config.task,
                asked,
                config.seed,
                sampling,
                {
                    "samples": config.samples,
                    "batch_size": config.batch_size,
                    "method": config.method,
                    "settings": settings.model_dump(),
                    "sink": sink,
                    "window": window,
                    "versions": job_versions(),
                },
            ),
            fresh=fresh,
            flag="",
            fix="give the settings that it was made with, name another --output, or start anew "
            "with --fresh",
        )
        content, save = store.content, store.save
    say(f"answers: {sampling.describe()} ({why})")
    if content:
        done = len(content.get("answers", ()))
        say(f"continues from {one_line(work)}: {done} of {config.n * config.samples} answers")
    model, tokenizer, _ = load_model(config.model, fingerprint.revision)

    answers = write_answers(
        model,
        tokenizer,
        task,
        asked,
        sampling=sampling,
        samples=config.samples,
        batch_size=config.batch_size,
        written=content.setdefault("answers", []),
        save=save,
        report=partial(report, "answering"),
    )
    if not answers.samples:
        if work is not None:
            work.unlink()  # of no use, and other settings would be refused
        raise RlkvError(
            f"model {one_line(config.model)}: none of its {answers.count} answers to task "
            f"{config.task} is correct ({answers.cut / answers.count:.0%} were cut off at "
            f"--max-new-tokens {config.max_new_tokens}): choose a task that the model can solve, "
            "or raise --n or --max-new-tokens"
        )
    gates = scorer.score(
        ScoringInput(
            model=model,
            tokenizer=tokenizer,
            task=task,
            problems=answers.problems,
            samples=answers.samples,
            sink=sink,
            window=window,
            seed=config.seed,
            settings=settings,
            report=partial(report, "scoring"),
            say=say,
            work=content.setdefault("scorer", {}),
            save=save,
        )
    )
    rows = measure_gates(  # yields each when it is asked for
        model,
        tokenizer,
        task,
        problems,
        gates,
        sink=sink,
        window=window,
        sparsities=config.sparsities,
        sampling=sampling,
        samples=config.samples,
        batch_size=config.batch_size,
        seed=config.seed + 1,
        report=report,
    )
    evaluation = list(rows) if problems else []
    profile = HeadProfile(
        model=fingerprint,
        gates=gates,
        sink=sink,
        window=window,
        provenance=Provenance(
            method=scorer.name,
            source=scorer.source,
            config={
                **asdict(config),
                # Not the path: a profile is public.
                "model": fingerprint.id,
                "task": task.name,
                "sparsities": list(config.sparsities),
                "sink": sink,
                "window": window,
                **sampling.model_dump(include={*_SAMPLING}),
                # All of them, where ScoreConfig has the changed ones.
                "settings": settings.model_dump(),
            },
            seed=config.seed,
            versions={
                name: importlib.metadata.version(name)
                for name in ("rlkv-vllm", "torch", "transformers")
            },
            created=date.today(),
            data=f"the model's own answers ({sampling.describe()}) to {config.n} problems of task "
            f"{task.name} (seed {config.seed}{_each(config.samples)}), of which the "
            f"{len(answers.samples)} correct ones were used",
        ),
    )
    return with_rows(profile, evaluation) if evaluation else profile


def _each(samples: int) -> str:
    return f", {samples} answers each" if samples > 1 else ""


def _check(config: ScoreConfig) -> None:
    minimum = {
        "n": 1, "evaluate": 0, "max_new_tokens": 1, "samples": 1, "batch_size": 1, "sink": 0,
        "window": 1,
    }  # fmt: skip
    for name, least in minimum.items():
        value = getattr(config, name)
        if value is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            raise RlkvError(f"{flag} {value}: must be at least {least}")
    for sparsity in config.sparsities:
        check_sparsity(sparsity)
