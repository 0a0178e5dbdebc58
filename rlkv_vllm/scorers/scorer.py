"""Input and output of a scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.options import Section, validate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkv_vllm.hf.answer_loss import Sample
    from rlkv_vllm.tasks import Problem, Task

Gates = list[list[float]]
#: A setting that is a rate or a weight.
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
        seed: of all random choices.
        settings: an instance of `Scorer.schema`.
        report: to be called with (work done, total work), in any unit, and figures in words if any.
        say: takes a line that stays, such as an estimate of the time.
        work: JSON values that a scorer wants to find again after a kill, in a run of the same
            settings.
        save: writes `work`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    problems: Sequence[Problem]
    samples: Sequence[Sample]
    sink: int
    window: int
    seed: int
    settings: Any
    report: Callable[..., None]
    say: Callable[[str], None] = lambda text: None
    work: dict[str, Any] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Scorer:
    """A method that produces gates.

    Attributes:
        name: what `rlkv score --method` calls it.
        source: the paper.
        score: gates ``[layers][KV heads]`` in [0, 1], higher for heads that need their full
            cache; the same input gives the same gates.
        schema: its settings and their defaults.
    """

    name: str
    source: str
    score: Callable[[ScoringInput], Gates]
    schema: type[Section] = Section

    def settings(self, given: Mapping[str, Any] | None = None) -> Section:
        """All settings, with those `given` in place of the defaults.

        Raises:
            RlkvError: if there is no such setting, or its value is not allowed.
        """
        given = given or {}
        known = {name: field.default for name, field in self.schema.model_fields.items()}
        for key in given.keys() - known.keys():
            choices = ", ".join(f"{name} ({default})" for name, default in known.items())
            raise RlkvError(
                f"--set {one_line(key, 60)}: {self.name} has no such setting: "
                f"{f'choose from {choices}' if choices else 'it has none at all'}"
            )
        return validate(self.schema, given, "--set", "docs/find-heads.md")


def to_gates(scores_LH: Gates) -> Gates:
    """Scores mapped linearly onto [0, 1]: the lowest becomes 0, the highest 1.

    The order, all that an allocation looks at, stays. Equal scores throughout become 1.
    """
    flat = [score for row in scores_LH for score in row]
    low, span = min(flat), max(flat) - min(flat)
    if span == 0:
        return [[1.0 for _ in row] for row in scores_LH]
    return [[min(1.0, max(0.0, (score - low) / span)) for score in row] for row in scores_LH]
