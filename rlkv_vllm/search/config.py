"""Options of a refinement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rlkv_vllm.options import Positive, Section, Share


class RefineConfig(Section):
    """Search for full heads by the answers of really split heads, after the training."""

    enabled: bool = Field(default=False, description="Whether to refine the gates.")
    start: Path | None = Field(
        default=None,
        description="Head profile to refine, in place of training; null: the trained gates.",
    )
    sparsities: Annotated[list[Share], Field(min_length=1)] = Field(
        default=[0.4, 0.5], description="Sparsities that count, all alike."
    )
    reach: Positive = Field(
        default=10, description="Heads in question on either side of a sparsity's line."
    )
    candidates: Positive = Field(
        default=64, description="Allocations per sparsity in the first round of a race."
    )
    problems: Positive = Field(
        default=256,
        description="Problems that finalists solve; as many others test the winner. At most half "
        "of the curriculum.",
    )
    level: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="p-value up to which the winner's gain counts as real."
    )
    max_new_tokens: Positive | None = Field(
        default=None, description="Where an answer is cut off; null: as in training."
    )
    batch_size: Positive = Field(default=128, description="Answers written together.")
