"""Answers through the served engine, with its cache really split."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.engine.launch import started
from rlkv_vllm.engine.sampling import vllm_sampling
from rlkv_vllm.evaluation.splits import Split
from rlkv_vllm.tasks import Problem, Task, is_solved, output_text
from rlkv_vllm.tasks.measurement import Measurement

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def answer(
    model: str,
    split: Split,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    engine_options: dict[str, Any] | None = None,
) -> Measurement:
    """Answer all problems, at least one, at once by a new engine.

    `model` is a folder or Hub id; `engine_options` are more arguments of ``vllm.LLM``.

    Raises:
        RlkvError: the cache of the engine is not split.
    """
    from vllm import SamplingParams

    show_bars = sys.stderr.isatty()
    options = {"disable_log_stats": True, "use_tqdm_on_load": show_bars} | (engine_options or {})
    with started(model, split.choice.engine_config(), **options) as llm:
        # Work that is done once, for the first request, is not timed. No problem is used: its
        # prompt would stay in the prefix cache.
        warm_up: Any = [{"role": "user", "content": "1"}]
        llm.chat(warm_up, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        return answer_with(llm, task, problems, sampling, show_bar=show_bars)


def answer_with(
    llm: LLM,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    show_bar: bool = False,
) -> Measurement:
    """Answer all problems, at least one, at once by a running engine."""
    messages: Any = [problem.messages for problem in problems]
    started = time.perf_counter()
    outputs = llm.chat(messages, _sampling_params(sampling, len(problems)), use_tqdm=show_bar)
    seconds = time.perf_counter() - started
    tokenizer = llm.get_tokenizer()
    answers = []
    for output, problem in zip(outputs, problems, strict=True):
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        solved = is_solved(task, output_text(tokenizer, output.prompt or "", ids), problem)
        is_capped = completion.finish_reason == "length"
        answers.append(Answer(ids, is_correct=solved, hit_cap=is_capped))
    # Only their figures are asked for: tokens of all splits would fill the memory.
    return replace(Measurement.of(answers, seconds), answers=())


def _sampling_params(sampling: Sampling, n: int) -> list[SamplingParams]:
    # Far apart, so that no two evaluations share a seed; the same for a problem at every split.
    spread = sampling.model_copy(update={"seed": sampling.seed * 1_000_003})
    return [vllm_sampling(spread, place) for place in range(n)]
