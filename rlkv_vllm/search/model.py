"""The model of a search: answers and cross-entropies with really split heads, by all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.allocation.streaming import Streaming, full_heads
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report
from rlkv_vllm.hf.answer_loss import Sample, SplitLoss
from rlkv_vllm.hf.answers import HeadSplit
from rlkv_vllm.hf.own_answers import write_answers
from rlkv_vllm.tasks import Problem
from rlkv_vllm.training.solver import Solver


class SplitModel:
    """A model and the problems that it solves with its full cache.

    Every process has one and does its share; all get the same results.
    """

    def __init__(
        self,
        solver: Solver,
        problems: Sequence[Problem],
        span: Span,
        *,
        sampling: Sampling,
        batch_size: int,
        processes: PartialState,
        report: Report,
    ) -> None:
        self._solver, self._problems, self._span = solver, problems, span
        self._sampling, self._batch_size, self._report = sampling, batch_size, report
        self._rank, self._world = processes.process_index, processes.num_processes
        self._samples: list[Sample] = []

    def write_answers(
        self, problems: Sequence[int], written: list[dict[str, Any]], save: Callable[[], None]
    ) -> None:
        """Answer `problems` with the full cache; `cross_entropy` is that of the correct ones.

        Raises:
            RlkvError: none is correct.
        """
        found = write_answers(
            self._solver.model,
            self._solver.tokenizer,
            self._solver.task,
            [self._problems[i] for i in problems],
            sampling=self._sampling,
            samples=1,
            batch_size=self._batch_size,
            written=written,
            save=save,
            report=partial(self._report, "own answers"),
        ).samples
        (samples,) = broadcast_object_list([found])  # one process's for all
        if not samples:
            raise RlkvError(
                f"none of {len(problems)} own answers is correct, to problems that the model has "
                "solved before: lower the temperature, and choose another --output"
            )
        self._samples = samples[self._rank :: self._world]

    def cross_entropy(self, streaming: Streaming) -> float:
        """Nats per token of the own answers while these heads stream."""
        tokens, nats = sum(len(sample.completion_ids) for sample in self._samples), 0.0
        if tokens:  # there may be fewer answers than processes
            # Answers are written with gates of their own, so these ones cannot stay.
            with SplitLoss(self._solver.model, self._samples, *self._span) as loss:
                nats = loss(streaming) * tokens
        shares = gather_object([(nats, tokens)])
        return sum(nats for nats, _ in shares) / sum(tokens for _, tokens in shares)

    def solve(
        self, problems: Sequence[int], streaming: Sequence[Streaming], seed: int
    ) -> list[bool]:
        """Which of `problems` are solved, each with streaming heads of its own."""
        model = self._solver.fingerprint
        mine = range(self._rank, len(problems), self._world)
        correct: Sequence[bool] = []
        if mine:  # the last few answers may be fewer than processes
            full = [full_heads(streaming[i], model.num_layers, model.num_kv_heads) for i in mine]
            correct = self._solver.solve(
                [self._problems[problems[i]] for i in mine],
                sampling=self._sampling.model_copy(update={"seed": (seed + self._rank) % 2**31}),
                batch_size=self._batch_size,
                split=[HeadSplit(heads, *self._span) for heads in full],
            ).correct
        found = gather_object(list(zip(mine, correct, strict=True)))
        return [is_solved for _, is_solved in sorted(found)]
