"""The answers of a measurement as JSON files hold them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from rlkv_vllm.tasks.measurement import Measurement


class StoredAnswers(BaseModel):
    """What is read back of a measurement; all its figures follow from it.

    `correct` and `cut` have a digit, `output_lengths` a number per answer; other keys are ignored.
    """

    samples: int = Field(ge=1)
    correct: str = Field(pattern=r"^[01]+$")
    cut: str = Field(pattern=r"^[01]+$")
    output_lengths: list[Annotated[int, Field(ge=0)]]
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_each_per_answer(self) -> StoredAnswers:
        if not len(self.correct) == len(self.output_lengths) == len(self.cut):
            raise ValueError("correct, cut and output_lengths do not fit each other")
        if len(self.correct) % self.samples:
            raise ValueError("correct and samples do not fit each other")
        return self

    def measurement(self) -> Measurement:
        """The measurement, without the texts of its answers."""
        return Measurement(
            correct=tuple(bit == "1" for bit in self.correct),
            output_tokens=tuple(self.output_lengths),
            cut=tuple(bit == "1" for bit in self.cut),
            seconds=self.seconds,
            samples=self.samples,
        )


def stored_answers(measured: Measurement) -> dict[str, Any]:
    """The keys that `StoredAnswers` reads, as plain JSON values."""
    return {
        "samples": measured.samples,
        "correct": "".join("01"[right] for right in measured.correct),
        "cut": "".join("01"[cut] for cut in measured.cut),
        "output_lengths": list(measured.output_tokens),
        "seconds": measured.seconds,
    }
