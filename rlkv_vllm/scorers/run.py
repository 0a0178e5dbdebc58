"""One run of a scorer: the model's own correct answers, gates, evaluation, head profile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.allocation.heads import allocate, check_sparsity
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.masked import HeadSplit, TaskResult, solve
from rlkv_vllm.evaluation.tasks import Problem, Task, get_task
from rlkv_vllm.profile import EvaluationRow, HeadProfile, ModelFingerprint, Provenance
from rlkv_vllm.profile.io import load_model_fingerprint, one_line
from rlkv_vllm.scorers import Gates, Sample, ScoringInput, get_scorer
from rlkv_vllm.testbed import MODEL_NAME, SINK, WINDOW, model_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Sink and window to serve with unless told otherwise, those of RLKV (arXiv 2510.08525).
DEFAULT_SINK, DEFAULT_WINDOW = 16, 64
#: A sparsity is recommended if it solves this share of the problems.
GOOD_ACCURACY = 0.95

#: Called with (what is being done, work done, work in all).
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScoreConfig:
    """Options of a run; all of them go into the provenance.

    Attributes:
        model: `embedded`, a model folder, or `org/name` on the Hugging Face hub.
        method: name of the scorer.
        task: name of the task that gives the problems.
        n: problems to answer; the correct answers are what the scorer sees.
        seed: of those problems; those of the evaluation have the next seed.
        sink: first tokens that a streaming head sees; None chooses for the model.
        window: last tokens that a streaming head sees; None chooses for the model.
        evaluate: fresh problems to evaluate the gates on, 0 for none.
        sparsities: where to evaluate; 0 is always evaluated.
        max_new_tokens: where an answer is cut off.
        batch_size: problems decoded together.
        revision: commit, branch or tag of a model on the hub.
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


def make_profile(
    config: ScoreConfig, report: Report = lambda stage, done, total: None
) -> HeadProfile:
    """Score the heads of a model.

    Raises:
        RlkvError: if an option is out of range, the model cannot be loaded or gated, or it
            answers none of the problems correctly.
    """
    _check(config)
    scorer = get_scorer(config.method)
    task = get_task(config.task)
    problems = fresh_problems(task, config.evaluate, config.seed, config.n)
    embedded = config.model == MODEL_NAME
    sink = config.sink if config.sink is not None else SINK if embedded else DEFAULT_SINK
    window = config.window if config.window is not None else WINDOW if embedded else DEFAULT_WINDOW
    model, tokenizer, fingerprint = load_model(config.model, config.revision)

    samples = own_correct_answers(model, tokenizer, task, config, report)
    gates = scorer.score(
        ScoringInput(
            model=model,
            samples=samples,
            sink=sink,
            window=window,
            seed=config.seed,
            report=lambda done, total: report("scoring", done, total),
        )
    )
    rows: list[EvaluationRow] = []
    if problems:
        results = evaluate_gates(
            model, tokenizer, task, problems, gates, sink, window, config, report
        )
        rows = [
            EvaluationRow(
                task=task.name,
                n=len(problems),
                sparsity=sparsity,
                accuracy=result.accuracy,
                full_accuracy=results[0.0].accuracy,
                mean_output_tokens=result.mean_output_tokens,
            )
            for sparsity, result in results.items()
        ]
    return HeadProfile(
        model=fingerprint,
        gates=gates,
        sink=sink,
        window=window,
        provenance=Provenance(
            method=scorer.name,
            source=scorer.source,
            config={
                **_json(asdict(config)),
                # Where a local copy lies is nobody else's business.
                "model": fingerprint.id,
                "task": task.name,
                "sink": sink,
                "window": window,
                **scorer.config,
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
        evaluation=rows,
        recommended_sparsity=recommended_sparsity(rows),
    )


def load_model(
    name: str, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelFingerprint]:
    """A model to score, on the GPU if there is one.

    float32 on the CPU, where bfloat16 is slow and coarse; else what the checkpoint has.

    Raises:
        RlkvError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(name)
    fingerprint = load_model_fingerprint(source, revision)
    if name == MODEL_NAME:
        fingerprint = fingerprint.model_copy(update={"id": MODEL_NAME})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=fingerprint.revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=fingerprint.revision, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise RlkvError(
            f"model {one_line(name)}: cannot be loaded ({one_line(error)}): give a Hugging Face "
            "decoder with weights and tokenizer"
        ) from error
    if tokenizer.chat_template is None:
        raise RlkvError(
            f"model {one_line(name)}: its tokenizer has no chat template: give a chat model"
        )
    return model.to(device).eval(), tokenizer, fingerprint


def own_correct_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: ScoreConfig,
    report: Report,
) -> list[Sample]:
    """The correct ones of the model's greedy answers with its full cache.

    Raises:
        RlkvError: if there is none.
    """
    problems = task.problems(config.n, config.seed)
    result = _solve(model, tokenizer, task, problems, None, config, report, "answering")
    samples = [
        Sample(answer.prompt_ids, answer.output_ids)
        for answer in result.answers
        if answer.is_correct
    ]
    if not samples:
        raise RlkvError(
            f"model {one_line(config.model)}: none of its {config.n} answers to task "
            f"{config.task} is correct ({result.capped_share:.0%} were cut off at "
            f"--max-new-tokens {config.max_new_tokens}): choose a task that the model can solve, "
            "or raise --n or --max-new-tokens"
        )
    return samples


def fresh_problems(task: Task, wanted: int, seed: int, scored: int) -> list[Problem]:
    """Problems of the next seed, without those that are scored.

    Args:
        task: where they come from.
        wanted: how many to draw; of a small file fewer may be left, of a generator none is lost.
        seed: of the scored problems.
        scored: how many problems are scored.

    Raises:
        RlkvError: if none is left.
    """
    known = task.problems(scored, seed)
    left = [problem for problem in task.problems(wanted, seed + 1) if problem not in known]
    if wanted and not left:
        raise RlkvError(
            f"task {task.name}: with --n {scored} no problem is left for --evaluate {wanted}: "
            "lower --n or add problems"
        )
    return left


def evaluate_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    gates: Gates,
    sink: int,
    window: int,
    config: ScoreConfig,
    report: Report,
) -> dict[float, TaskResult]:
    """Solve `problems` at every sparsity, 0 included, in ascending order."""
    results = {}
    for sparsity in sorted({0.0, *config.sparsities}):
        split = HeadSplit(allocate(gates, sparsity).full, sink, window) if sparsity else None
        results[sparsity] = _solve(
            model, tokenizer, task, problems, split, config, report, f"sparsity {sparsity:g}"
        )
    return results


def recommended_sparsity(rows: Sequence[EvaluationRow]) -> float | None:
    """The largest evaluated sparsity that solves `GOOD_ACCURACY` of the problems, if any does."""
    return max((row.sparsity for row in rows if row.accuracy >= GOOD_ACCURACY), default=None)


def _solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    split: HeadSplit | None,
    config: ScoreConfig,
    report: Report,
    stage: str,
) -> TaskResult:
    done = 0

    def count(solved: int) -> None:
        nonlocal done
        done += solved
        report(stage, done, len(problems))

    return solve(
        model,
        tokenizer,
        task,
        problems,
        split=split,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        report=count,
    )


def _check(config: ScoreConfig) -> None:
    minimum = {"n": 1, "evaluate": 0, "max_new_tokens": 1, "batch_size": 1, "sink": 0, "window": 1}
    for name, least in minimum.items():
        value = getattr(config, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise RlkvError(f"--{flag} {value}: must be at least {least}")
    for sparsity in config.sparsities:
        check_sparsity(sparsity)


def _json(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
