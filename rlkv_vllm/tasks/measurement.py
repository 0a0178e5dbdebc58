"""The answers to a set of problems, reduced to what tables and tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlkv_vllm.answers import Answer
from rlkv_vllm.statistics import percentile_95, wilson_interval


def _sums(values: Sequence[int], size: int) -> list[int]:
    if size == 1:
        return list(values)
    return [sum(values[start : start + size]) for start in range(0, len(values), size)]


@dataclass(frozen=True)
class Measurement:
    """How the problems were answered with one split of the cache.

    Attributes:
        correct: per answer; the answers of a problem stand in a row. At least one.
        output_tokens: length per answer, end token included.
        cut: per answer, whether the token limit cut it off.
        seconds: wall time of answering all together, without the engine's start; 0: not measured.
        samples: answers per problem.
        answers: the answers themselves, where they are wanted.
    """

    correct: Sequence[bool]
    output_tokens: Sequence[int]
    cut: Sequence[bool]
    seconds: float = 0.0
    samples: int = 1
    answers: Sequence[Answer] = field(default=(), repr=False)

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float = 0.0, samples: int = 1) -> Measurement:
        """The measurement of `answers`, `samples` per problem in a row."""
        return cls(
            correct=[answer.is_correct for answer in answers],
            output_tokens=[len(answer.token_ids) for answer in answers],
            cut=[answer.hit_cap for answer in answers],
            seconds=seconds,
            samples=samples,
            answers=answers,
        )

    def first(self, problems: int) -> Measurement:
        """That of the first `problems` problems; its time is the same share of the whole."""
        end = problems * self.samples
        return Measurement(
            correct=self.correct[:end],
            output_tokens=self.output_tokens[:end],
            cut=self.cut[:end],
            seconds=self.seconds * problems / self.n,
            samples=self.samples,
            answers=self.answers[:end],
        )

    def then(self, more: Measurement) -> Measurement:
        """That of these problems and of `more`, answered afterwards in the same way."""
        return Measurement(
            correct=[*self.correct, *more.correct],
            output_tokens=[*self.output_tokens, *more.output_tokens],
            cut=[*self.cut, *more.cut],
            seconds=self.seconds + more.seconds,
            samples=self.samples,
            answers=[*self.answers, *more.answers],
        )

    @property
    def n(self) -> int:
        """Number of problems."""
        return len(self.correct) // self.samples

    @property
    def solved(self) -> int:
        """Number of correct answers."""
        return sum(self.correct)

    @property
    def solved_per_problem(self) -> list[int]:
        """Correct answers to each problem."""
        return _sums(self.correct, self.samples)

    @property
    def tokens_per_problem(self) -> list[int]:
        """Output tokens of all answers to each problem."""
        return _sums(self.output_tokens, self.samples)

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.solved / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy; several answers per problem count as one.

        That is wide where they differ: comparisons with the full cache are paired instead.
        """
        return wilson_interval(self.solved / self.samples, self.n)

    @property
    def mean_output_tokens(self) -> float:
        return sum(self.output_tokens) / len(self.output_tokens)

    @property
    def p95_output_tokens(self) -> int:
        return percentile_95(self.output_tokens)

    @property
    def capped(self) -> int:
        """Number of answers that were cut off."""
        return sum(self.cut)

    @property
    def capped_share(self) -> float:
        return self.capped / len(self.cut)

    @property
    def seconds_per_solved(self) -> float | None:
        """Seconds of the whole run per correct answer, None if unknown or nothing is solved.

        A throughput of this machine with all problems in flight together, not the time that one
        request takes.
        """
        return self.seconds / self.solved if self.seconds and self.solved else None
