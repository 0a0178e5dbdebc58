"""Accuracy of a model through the served engine, with its cache really split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.tasks import Problem, Task

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Score:
    """How many problems of a task were solved at one sparsity.

    Attributes:
        task: name of the task.
        sparsity: share of streaming KV heads.
        n: problems.
        solved: problems with the right answer.
        mean_output_tokens: mean length of the answers (tokens).
        p95_output_tokens: 95th percentile of the lengths (tokens).
        capped: answers that hit the length cap.
    """

    task: str
    sparsity: float
    n: int
    solved: int
    mean_output_tokens: float
    p95_output_tokens: int
    capped: int

    @property
    def accuracy(self) -> float:
        """Share of solved problems."""
        return self.solved / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        z, n, p = 1.96, self.n, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        low, high = self.interval
        return asdict(self) | {"accuracy": self.accuracy, "low": low, "high": high}


def evaluate(
    model: str,
    profile: str,
    sparsities: Sequence[float],
    task: Task,
    *,
    n: int,
    seed: int,
    max_tokens: int,
    sink: int | None = None,
    window: int | None = None,
    engine_options: dict[str, Any] | None = None,
    on_score: Callable[[Score], None] = lambda _: None,
) -> list[Score]:
    """Greedy answers to fresh problems, one engine after the other.

    Args:
        model: model folder or Hub id.
        profile: path or name of a head profile.
        sparsities: shares of streaming heads; 0 is the full cache, 1 StreamingLLM.
        task: where the problems come from.
        n: problems.
        seed: of the problems.
        max_tokens: length cap of an answer.
        sink: first tokens kept, instead of the profile's.
        window: last tokens kept, instead of the profile's.
        engine_options: more arguments of ``vllm.LLM``.
        on_score: called as soon as a sparsity is done.
    """
    problems = task.problems(n, seed)
    scores = []
    for sparsity in sparsities:
        split = {"profile": profile, "sparsity": sparsity, "sink": sink, "window": window}
        options = {"disable_log_stats": True} | (engine_options or {})
        options["additional_config"] = {"rlkv": split}
        score = _score(model, options, problems, task, sparsity, max_tokens)
        on_score(score)
        scores.append(score)
    return scores


def _score(
    model: str,
    options: dict[str, Any],
    problems: Sequence[Problem],
    task: Task,
    sparsity: float,
    max_tokens: int,
) -> Score:
    from vllm import LLM, SamplingParams

    llm: LLM = LLM(model, **options)
    try:
        _require_split(llm)
        messages: Any = [problem.messages for problem in problems]
        outputs = llm.chat(
            messages, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=True
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    completions = [output.outputs[0] for output in outputs]
    lengths = sorted(len(completion.token_ids) for completion in completions)
    return Score(
        task=task.name,
        sparsity=sparsity,
        n=len(problems),
        solved=sum(
            task.check(completion.text, problem.answer)
            for completion, problem in zip(completions, problems, strict=True)
        ),
        mean_output_tokens=sum(lengths) / len(lengths),
        p95_output_tokens=lengths[math.ceil(0.95 * len(lengths)) - 1],
        capped=sum(completion.finish_reason == "length" for completion in completions),
    )


def _require_split(llm: LLM) -> None:
    """Refuse to report a full cache as a split one.

    Raises:
        RlkvError: the plugin is not loaded in the engine's workers.
    """
    reports = llm.collective_rpc("rlkv_split_report")
    if not reports or not all(report["active"] for report in reports):
        raise RlkvError(
            "the engine runs without the split cache: is the plugin installed? Run `rlkv doctor`"
        )
