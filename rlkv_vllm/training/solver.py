"""The model of a job and the task that it solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.hf.answers import solve
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
    """An ungated model and a task; `settings` are plain values that decide its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: ModelFingerprint
    task: Task
    settings: dict[str, Any]

    @classmethod
    def load(cls, job: JobConfig, task: Task, device: torch.device) -> Solver:
        """The model of a job, loaded."""
        model, tokenizer, fingerprint = load_model(job.model, job.revision, job.dtype, device)
        settings = {
            "model": fingerprint.model_dump(mode="json"),
            "task": job.task.model_dump(mode="json"),
        }
        return cls(model, tokenizer, fingerprint, task, settings)

    def solve(self, problems: Sequence[Problem], **options: Any) -> Measurement:
        """Answer problems of the task; options as of `rlkv_vllm.hf.answers.solve`."""
        return solve(self.model, self.tokenizer, self.task, problems, **options)
