"""How answers are sampled, and what an answer is: the same types wherever answers are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """Sampling parameters; names, meaning and defaults as in vLLM's `SamplingParams`.

    Temperature 0 is greedy decoding; top_p 1, top_k 0, min_p 0 and repetition_penalty 1 do nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def describe(self) -> str:
        """In words, for titles."""
        limits = ["greedy"] if self.is_greedy else [f"temperature {self.temperature:g}"]
        if self.top_p < 1 and not self.is_greedy:
            limits.append(f"top-p {self.top_p:g}")
        if self.top_k and not self.is_greedy:
            limits.append(f"top-k {self.top_k}")
        if self.min_p and not self.is_greedy:
            limits.append(f"min-p {self.min_p:g}")
        if self.repetition_penalty != 1:
            limits.append(f"repetition penalty {self.repetition_penalty:g}")
        return ", ".join(limits)


@dataclass(frozen=True)
class Answer:
    """What a model wrote for one prompt.

    Attributes:
        token_ids: generated tokens; the end token is the last one if there is one.
        prompt_ids: the prompt, where it is known.
        logprobs: as sampled: after temperature and the other parameters; None: not asked for.
        text: the output as a task scores it.
        hit_cap: whether the token limit cut it off.
    """

    token_ids: list[int]
    prompt_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    text: str = ""
    is_correct: bool = False
    hit_cap: bool = False
