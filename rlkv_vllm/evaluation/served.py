"""Answers through the served engine, with its cache really split."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.engine.launch import started
from rlkv_vllm.engine.sampling import vllm_sampling
from rlkv_vllm.evaluation.splits import SEEDS, Ask, Split
from rlkv_vllm.tasks import Problem, Task, is_solved, output_text
from rlkv_vllm.tasks.measurement import Measurement

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@contextmanager
def opened(
    model: str,
    split: Split,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    samples: int = 1,
    engine_options: dict[str, Any] | None = None,
) -> Iterator[Ask]:
    """A new engine that answers parts of `problems`, each all at once.

    `model` is a folder or Hub id; `engine_options` are more arguments of ``vllm.LLM``.

    Raises:
        RlkvError: the cache of the engine is not split.
    """
    from vllm import SamplingParams

    show_bars = sys.stderr.isatty()
    options = {"disable_log_stats": True, "use_tqdm_on_load": show_bars} | (engine_options or {})
    if split.tp_size > 1:
        options["tensor_parallel_size"] = split.tp_size
    with started(model, split.choice.engine_config(), **options) as llm:
        # Work that is done once, for the first request, is not timed. No problem is used: its
        # prompt would stay in the prefix cache.
        warm_up: Any = [{"role": "user", "content": "1"}]
        llm.chat(warm_up, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)

        def ask(start: int, end: int) -> Measurement:
            return answer_with(
                llm,
                task,
                problems[start:end],
                sampling,
                samples=samples,
                start=start,
                show_bar=show_bars,
            )

        yield ask


def answer_with(
    llm: LLM,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    samples: int = 1,
    start: int = 0,
    show_bar: bool = False,
) -> Measurement:
    """Answer all problems, at least one, at once by a running engine.

    `samples` answers per problem stand in a row; `start` is the place of the first problem in the
    evaluation, which decides its random numbers.
    """
    messages: Any = [problem.messages for problem in problems for _ in range(samples)]
    places = range(start * samples, (start + len(problems)) * samples)
    started = time.perf_counter()
    outputs = llm.chat(messages, _sampling_params(sampling, places), use_tqdm=show_bar)
    seconds = time.perf_counter() - started
    tokenizer = llm.get_tokenizer()
    answers = []
    for place, output in enumerate(outputs):
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        text = output_text(tokenizer, output.prompt or "", ids)
        solved = is_solved(task, text, problems[place // samples])
        is_capped = completion.finish_reason == "length"
        answers.append(Answer(ids, is_correct=solved, hit_cap=is_capped))
    # Only their figures are asked for: tokens of all splits would fill the memory.
    return replace(Measurement.of(answers, seconds, samples), answers=())


def _sampling_params(sampling: Sampling, places: Iterable[int]) -> list[SamplingParams]:
    # Far apart, so that no two evaluations share a seed; the same for an answer at every split.
    spread = sampling.model_copy(update={"seed": sampling.seed * SEEDS})
    return [vllm_sampling(spread, place) for place in places]
