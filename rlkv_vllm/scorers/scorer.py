"""What every scorer gets and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkv_vllm.tasks import Problem, Task

Gates = list[list[float]]
#: What a setting of a scorer may be.
Setting = bool | int | float | str


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
        tokenizer: the model's, with a chat template.
        task: where the problems come from.
        problems: those that the model solved, at least one.
        samples: the model's own correct answers to `problems`, in their order.
        sink: first tokens that a streaming head sees.
        window: last tokens that a streaming head sees, the query's own included.
        seed: for whatever is random.
        settings: all settings of the scorer, as `Scorer.settings` gives them.
        report: to be called with (work done, work in all), in any unit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    problems: Sequence[Problem]
    samples: Sequence[Sample]
    sink: int
    window: int
    seed: int
    settings: Mapping[str, Any]
    report: Callable[[int, int], None]


@dataclass(frozen=True)
class Scorer:
    """A method that produces gates.

    Attributes:
        name: what `rlkv score --method` calls it.
        source: the paper.
        score: gates ``[layers][KV heads]`` in [0, 1], the higher the more a head needs its whole
            cache; the same ones for the same input.
        config: its settings and their defaults.
    """

    name: str
    source: str
    score: Callable[[ScoringInput], Gates]
    config: Mapping[str, Setting] = field(default_factory=dict)

    def settings(self, given: Mapping[str, Any] | None = None) -> dict[str, Setting]:
        """All settings, with those `given` in place of the defaults.

        Args:
            given: by name; a text is read as what the default is.

        Raises:
            RlkvError: if there is no such setting, or its value is of another type.
        """
        settings = dict(self.config)
        for key, value in (given or {}).items():
            if key not in settings:
                known = ", ".join(f"{name} ({default})" for name, default in settings.items())
                raise RlkvError(
                    f"--set {one_line(key, 60)}: {self.name} has no such setting: "
                    f"{f'choose from {known}' if known else 'it has none at all'}"
                )
            settings[key] = _typed(key, value, settings[key])
        return settings


def _typed(key: str, value: Any, default: Setting) -> Setting:
    """`value` as what `default` is."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        typed: Setting = kind(str(value))
        if isinstance(typed, float) and not (math.isfinite(typed) and typed >= 0):
            raise ValueError
        if isinstance(typed, int) and typed < 1:
            raise ValueError
    except (KeyError, ValueError) as error:
        names = {bool: "true or false", int: "a positive whole number", float: "a number >= 0"}
        raise RlkvError(
            f"--set {key}={one_line(value, 60)}: must be {names[kind]}, the default is {default}"
        ) from error
    return typed


def to_gates(scores_LH: Gates) -> Gates:
    """Scores mapped linearly onto [0, 1]: the lowest becomes 0, the highest 1.

    The order, all that an allocation looks at, stays. Equal scores throughout become 1.
    """
    flat = [score for row in scores_LH for score in row]
    low, span = min(flat), max(flat) - min(flat)
    if span == 0:
        return [[1.0 for _ in row] for row in scores_LH]
    return [[min(1.0, max(0.0, (score - low) / span)) for score in row] for row in scores_LH]
