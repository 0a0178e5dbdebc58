"""The answers to a set of problems, reduced to what tables and tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlkv_vllm.answers import Answer
from rlkv_vllm.statistics import percentile_95, wilson_interval


@dataclass(frozen=True)
class Measurement:
    """How the problems were answered with one split of the cache.

    `correct` and `output_tokens` (end token included) are per problem, of which there is at least
    one. `capped` answers were cut off by the token limit. `seconds` is the wall time of answering
    all together, without the engine's start; 0 if not measured.
    """

    correct: Sequence[bool]
    output_tokens: Sequence[int]
    capped: int
    seconds: float = 0.0
    answers: Sequence[Answer] = field(default=(), repr=False)

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float = 0.0) -> Measurement:
        """The measurement of `answers`, one per problem."""
        return cls(
            correct=[answer.is_correct for answer in answers],
            output_tokens=[len(answer.token_ids) for answer in answers],
            capped=sum(answer.hit_cap for answer in answers),
            seconds=seconds,
            answers=answers,
        )

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def solved(self) -> int:
        return sum(self.correct)

    @property
    def accuracy(self) -> float:
        return self.solved / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy."""
        return wilson_interval(self.solved, self.n)

    @property
    def mean_output_tokens(self) -> float:
        return sum(self.output_tokens) / self.n

    @property
    def p95_output_tokens(self) -> int:
        return percentile_95(self.output_tokens)

    @property
    def capped_share(self) -> float:
        return self.capped / self.n

    @property
    def seconds_per_solved(self) -> float | None:
        """Seconds of the whole run per solved problem, None if unknown or nothing is solved.

        A throughput of this machine with all problems in flight together, not the time that one
        request takes.
        """
        return self.seconds / self.solved if self.seconds and self.solved else None
