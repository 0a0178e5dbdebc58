"""The model of a job and the task that it solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.profile import ModelFingerprint
from rlkv_vllm.tasks import Problem, Task
from rlkv_vllm.tasks.measurement import Measurement
from rlkv_vllm.training.config import JobConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Solver:
    """A model and a task.

    Attributes:
        model: ungated.
        tokenizer: with a chat template.
        fingerprint: of the model.
        task: gives and checks the problems.
        settings: that decide its answers, plain values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: ModelFingerprint
    task: Task
    settings: dict[str, Any]

    @classmethod
    def load(cls, job: JobConfig, task: Task, device: torch.device) -> Solver:
        """Load the model of a job.

        Raises:
            RlkvError: it cannot be loaded.
        """
        model, tokenizer, fingerprint = load_model(job.model, job.revision, job.dtype, device)
        settings = {
            "model": fingerprint.model_dump(mode="json"),
            "task": job.task.model_dump(mode="json"),
        }
        return cls(model, tokenizer, fingerprint, task, settings)

    def solve(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        batch_size: int,
        split: Sequence[HeadSplit] | None = None,
    ) -> Measurement:
        """Answer problems.

        Args:
            problems: of the task, at least one.
            sampling: of the answers.
            batch_size: problems answered together.
            split: full heads for each problem; None for the full cache.
        """
        return solve(
            self.model,
            self.tokenizer,
            self.task,
            problems,
            sampling=sampling,
            split=split,
            batch_size=batch_size,
        )
