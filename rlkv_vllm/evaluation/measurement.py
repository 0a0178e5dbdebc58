"""The answers to a set of problems, reduced to what tables and tests need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlkv_vllm.statistics import percentile_95, wilson_interval


class Result(Protocol):
    """What a row of a table says, however the answers were made."""

    @property
    def accuracy(self) -> float:
        """Share of problems solved."""

    @property
    def mean_output_tokens(self) -> float:
        """Mean length of the answers (tokens)."""

    @property
    def p95_output_tokens(self) -> int:
        """95th percentile of the lengths (tokens)."""

    @property
    def capped_share(self) -> float:
        """Share of the answers that the length cap cut off."""


@dataclass(frozen=True)
class Measurement:
    """How the problems were answered with one split of the cache.

    Attributes:
        correct: per problem, whether it is solved; not empty.
        output_tokens: per problem, the length of the answer (tokens).
        capped: answers that the length cap cut off.
        seconds: wall time of answering all of them together, without the engine's start.
    """

    correct: tuple[bool, ...]
    output_tokens: tuple[int, ...]
    capped: int
    seconds: float

    @property
    def n(self) -> int:
        """Problems."""
        return len(self.correct)

    @property
    def solved(self) -> int:
        """Problems with the right answer."""
        return sum(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of problems solved."""
        return self.solved / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy."""
        return wilson_interval(self.solved, self.n)

    @property
    def mean_output_tokens(self) -> float:
        """Mean length of the answers (tokens)."""
        return sum(self.output_tokens) / self.n

    @property
    def p95_output_tokens(self) -> int:
        """95th percentile of the lengths (tokens)."""
        return percentile_95(self.output_tokens)

    @property
    def capped_share(self) -> float:
        """Share of the answers that the length cap cut off."""
        return self.capped / self.n

    @property
    def seconds_per_solved(self) -> float | None:
        """Seconds of the whole run per solved problem, None if nothing is solved.

        A throughput of this machine with all problems in flight together, not the time that one
        request takes.
        """
        return self.seconds / self.solved if self.solved else None
