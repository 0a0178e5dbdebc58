"""One run of a scorer: the model's own correct answers, gates, evaluation, head profile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any

from rlkv_vllm.allocation.heads import check_sparsity
from rlkv_vllm.allocation.span import SERVING_SPAN, resolve_span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.files import one_line
from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.hf.answers import solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.models import default_span
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.scorers import get_scorer
from rlkv_vllm.scorers.scorer import ScoringInput
from rlkv_vllm.tasks import Problem, Task, get_task, skip_note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoreConfig:
    """Options of `rlkv score`, whose help describes them; all of them go into the provenance.

    `settings` are those of the scorer, in place of its defaults.
    """

    model: str
    method: str = "head-importance"
    task: str = "embedded"
    n: int = 64
    seed: int = 0
    sink: int | None = None
    window: int | None = None
    evaluate: int = 0
    sparsities: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    max_new_tokens: int = 512
    batch_size: int = 64
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def make_profile(
    config: ScoreConfig,
    report: Report = lambda *_: None,
    say: Callable[[str], None] = lambda text: None,
) -> HeadProfile:
    """Score the heads of a model.

    Raises:
        RlkvError: if an option is out of range, the model cannot be loaded or gated, or it
            answers none of the problems correctly.
    """
    _check(config)
    scorer = get_scorer(config.method)
    settings = scorer.settings(config.settings)
    task = get_task(config.task)
    if note := skip_note(task):
        say(note)
    problems = fresh_problems(
        task,
        config.evaluate,
        config.seed + 1,
        task.problems(config.n, config.seed),
        "--n or --evaluate",
    )
    sink, window = resolve_span(
        config.sink, config.window, default_span(config.model, SERVING_SPAN)
    )
    model, tokenizer, fingerprint = load_model(config.model, config.revision)

    solved, samples = own_correct_answers(model, tokenizer, task, config, report)
    gates = scorer.score(
        ScoringInput(
            model=model,
            tokenizer=tokenizer,
            task=task,
            problems=solved,
            samples=samples,
            sink=sink,
            window=window,
            seed=config.seed,
            settings=settings,
            report=partial(report, "scoring"),
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
        sampling=Sampling(max_tokens=config.max_new_tokens, temperature=0),
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
                # All of them, where ScoreConfig has the changed ones.
                "settings": settings.model_dump(),
            },
            seed=config.seed,
            versions={
                name: importlib.metadata.version(name)
                for name in ("rlkv-vllm", "torch", "transformers")
            },
            created=date.today(),
            data=f"the model's own greedy answers to {config.n} problems of task {task.name} "
            f"(seed {config.seed}), of which the {len(samples)} correct ones were used",
        ),
    )
    return with_rows(profile, evaluation) if evaluation else profile


def own_correct_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: ScoreConfig,
    report: Report,
) -> tuple[list[Problem], list[Sample]]:
    """What the model solves greedily with its full cache, at least one, and its answers."""
    problems = task.problems(config.n, config.seed)
    result = solve(
        model,
        tokenizer,
        task,
        problems,
        sampling=Sampling(max_tokens=config.max_new_tokens, temperature=0),
        batch_size=config.batch_size,
        report=partial(report, "answering"),
    )
    solved = [
        (problem, Sample(answer.prompt_ids, answer.token_ids))
        for problem, answer in zip(problems, result.answers, strict=True)
        if answer.is_correct
    ]
    if not solved:
        raise RlkvError(
            f"model {one_line(config.model)}: none of its {config.n} answers to task "
            f"{config.task} is correct ({result.capped_share:.0%} were cut off at "
            f"--max-new-tokens {config.max_new_tokens}): choose a task that the model can solve, "
            "or raise --n or --max-new-tokens"
        )
    return [problem for problem, _ in solved], [sample for _, sample in solved]


def _check(config: ScoreConfig) -> None:
    minimum = {"n": 1, "evaluate": 0, "max_new_tokens": 1, "batch_size": 1, "sink": 0, "window": 1}
    for name, least in minimum.items():
        value = getattr(config, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise RlkvError(f"--{flag} {value}: must be at least {least}")
    for sparsity in config.sparsities:
        check_sparsity(sparsity)
