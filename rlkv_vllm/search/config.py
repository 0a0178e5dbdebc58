"""Options of a refinement."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlkv_vllm.options import Positive, Section, Share
from rlkv_vllm.training.config import JobConfig


class SearchConfig(Section):
    """Search for full heads around those of a profile."""

    sparsities: Annotated[list[Share], Field(min_length=1)] = Field(
        default=[0.4, 0.5], description="Sparsities that count, all alike."
    )
    margin: Positive = Field(
        default=10,
        description="Heads that may move on either side of a sparsity's number of streaming heads.",
    )
    answers: Positive = Field(
        default=32,
        description="Own answers whose cross-entropy orders the neighbours; one to a problem.",
    )
    candidates: Positive = Field(default=12, description="Neighbours that race.")
    problems: Positive = Field(
        default=256,
        description="Problems of the race; as many others test the winner. At most half of those "
        "that the model solves with its full cache.",
    )
    level: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="p-value up to which a gain counts as real."
    )


class SamplingConfig(Section):
    """How answers are sampled; null: as the model's `generation_config.json` says."""

    max_tokens: Positive = Field(default=512, description="Where an answer is cut off.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="0 is greedy decoding."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None


class RefineConfig(JobConfig):
    """A refinement: profile, model, problems, search, evaluation."""

    profile: str = Field(description="Head profile to start from: a file, a name, or org/name.")
    sink: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="First tokens that streaming heads keep; null: the profile's."
    )
    window: Positive | None = Field(
        default=None, description="Last tokens that streaming heads keep; null: the profile's."
    )
    tried: Positive = Field(
        default=3000,
        description="Problems that the model tries with its full cache, at most: it stops when it "
        "has solved twice `search.problems`.",
    )
    sampling: SamplingConfig = Field(
        default=SamplingConfig(), description="Of all answers, those of the evaluation included."
    )
    batch_size: Positive = Field(default=128, description="Answers written together.")
    search: SearchConfig = Field(default=SearchConfig())
