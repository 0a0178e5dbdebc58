"""Equal memory, real answers: time per solved problem, and how many are solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rlkv_vllm.answers import Sampling
from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.bench.engine import Engine
from rlkv_vllm.evaluation.served import answer_with
from rlkv_vllm.tasks import get_task


class Solve(Case):
    """A task's problems, all in flight together."""

    name = "solve"
    title = "Time per solved problem"
    note = (
        "Tokens per second do not show whether answers got longer or wrong, so problems are solved "
        "and checked. All are in flight together. There is no roofline for solved problems."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("seconds_per_solved", "s / solved"),
        Metric("tokens_per_s", "tok/s", more_is_better=True),
        Metric("solved", "solved (%)", more_is_better=True, scale=100, is_ratio_shown=False),
        Metric("mean_tokens", "mean tokens", is_ratio_shown=False),
    )
    columns: ClassVar[dict[str, str]] = {"task": "task", "n": "problems"}

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        return [{"task": setup.task, "n": 256 if full else 64, "max_tokens": 1024, "seed": 1}]

    def prepare(self, engine: Engine, point: Point) -> Any:
        """The problems, and a first request that is not timed."""
        task = get_task(point["task"])
        problems = task.problems(point["n"], point["seed"])
        answer_with(engine.llm, task, problems, Sampling(max_tokens=8, temperature=0))
        return task, problems

    def turn(self, engine: Engine, point: Point, state: Any) -> dict[str, float]:
        task, problems = state
        engine.reset_prefix_cache()
        sampling = Sampling(max_tokens=point["max_tokens"], temperature=0)
        found = answer_with(engine.llm, task, problems, sampling)
        return {
            "seconds": found.seconds,
            "seconds_per_solved": found.seconds_per_solved or 0.0,
            "tokens_per_s": sum(found.output_tokens) / found.seconds,
            "solved": found.accuracy,
            "mean_tokens": found.mean_output_tokens,
        }
