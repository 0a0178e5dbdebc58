"""What every scorer gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import JsonValue
    from transformers import PreTrainedModel

Gates = list[list[float]]


@dataclass(frozen=True)
class Sample:
    """A problem and the correct answer that the model itself gave, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class ScoringInput:
    """What a scorer works on.

    Attributes:
        model: in evaluation mode; ungated, and to be left as it was.
        samples: the model's own correct answers, at least one.
        sink: first tokens that a streaming head sees.
        window: last tokens that a streaming head sees, the query's own included.
        seed: for whatever is random.
        report: to be called with (work done, work in all), in any unit.
    """

    model: PreTrainedModel
    samples: Sequence[Sample]
    sink: int
    window: int
    seed: int
    report: Callable[[int, int], None]


@dataclass(frozen=True)
class Scorer:
    """A method that produces gates.

    Attributes:
        name: what `rlkv score --method` calls it.
        summary: one line for the help text.
        source: the paper.
        config: its settings, for the provenance of the profile.
        score: gates ``[layers][KV heads]`` in [0, 1], the higher the more a head needs its whole
            cache; the same ones for the same input.
    """

    name: str
    summary: str
    source: str
    config: Mapping[str, JsonValue]
    score: Callable[[ScoringInput], Gates]
