"""Options of a training job: one schema for YAML file, command line and `run.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from rlkv_vllm.allocation.span import SERVING_SPAN, TRAINING_SPAN, Span, resolve_span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.models import default_span
from rlkv_vllm.options import Positive, Section, Share, override, read_options, validate
from rlkv_vllm.rollouts.config import RolloutConfig

DOCS = "docs/train.md"
#: What `trainer` may not set: the job decides it.
# fmt: off
_RESERVED = (
    "output_dir", "seed", "use_vllm", "vllm_importance_sampling_correction", "beta",
    "logging_steps", "logging_strategy", "report_to", "disable_tqdm", "do_eval", "eval_strategy",
    "load_best_model_at_end", "num_iterations", "use_transformers_continuous_batching",
    "use_transformers_paged",
)
# fmt: on


class TaskConfig(Section):
    """Where the problems come from and what counts as solving one."""

    name: str = Field(
        default="embedded",
        description="`embedded` or one of its families, `gym:NAME` (reasoning-gym), "
        "`datasets:NAME` (Hugging Face datasets), or the path of a .jsonl file.",
    )
    prompt_column: str = Field(default="prompt", description="Column that holds the question.")
    answer_column: str = Field(default="answer", description="Column that holds the answer.")
    split: str = Field(default="train", description="Split of a Hugging Face data set.")
    reward: str | None = Field(
        default=None,
        description="Own reward, `package.module:function`; null: 1 if the answer is right.",
    )


class CurriculumConfig(Section):
    """Self-distillation sampling: only problems that the ungated model solves are trained on."""

    problems: Positive = Field(default=3000, description="Problems that the ungated model tries.")
    keep: Positive | None = Field(
        default=None, description="Stop when so many are solved; null: try all of them."
    )
    max_new_tokens: Positive | None = Field(
        default=None, description="Where an answer is cut off; null: as in training."
    )
    greedy: bool = Field(
        default=False, description="Greedy answers instead of the trainer's sampling."
    )
    batch_size: Positive = Field(default=64, description="Problems answered together.")


class EvaluationConfig(Section):
    """Accuracy against sparsity of the finished gates, by mask, on fresh problems."""

    problems: Annotated[int, Field(ge=0)] = Field(
        default=300, description="Fresh problems; 0 leaves the evaluation out."
    )
    sparsities: list[Share] = Field(
        default=[0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], description="Where to evaluate."
    )
    max_new_tokens: Positive | None = Field(
        default=None, description="Where an answer is cut off; null: as in training."
    )
    samples: Positive = Field(default=1, description="Answers per problem.")
    greedy: bool = Field(
        default=False, description="Greedy answers instead of the job's sampling parameters."
    )
    batch_size: Positive = Field(default=64, description="Answers written together.")

    def sampling(self, job: Sampling, seed: int) -> Sampling:
        """How answers are sampled: as those of the `job`, with other random numbers.

        Raises:
            RlkvError: several samples are asked for, and all would be alike.
        """
        limit = self.max_new_tokens or job.max_tokens
        if self.greedy:
            job = Sampling(max_tokens=limit, temperature=0)
        if job.is_greedy and self.samples > 1:
            raise RlkvError(
                f"evaluation.samples {self.samples}: greedy decoding gives the same answer each "
                "time: set it to 1, or sample (evaluation.greedy, sampling.temperature)"
            )
        return job.model_copy(update={"max_tokens": limit, "seed": seed})


class JobConfig(Section):
    """What all jobs have: model, task, evaluation, and the folder of the run."""

    model: str = Field(default="embedded", description="`embedded`, a folder, or org/name.")
    revision: str | None = Field(default=None, description="Commit, branch or tag on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the frozen weights; auto: float32 on CPU, else as stored."
    )
    output: Path = Field(description="Folder of the run.")
    seed: Annotated[int, Field(ge=0, lt=2**31 - 1)] = Field(
        default=0, description="Of problems, answers and data order; the evaluation has the next."
    )
    task: TaskConfig = Field(default=TaskConfig())
    evaluation: EvaluationConfig = Field(default=EvaluationConfig())


class TrainConfig(JobConfig):
    """A training job: model, problems, gate training, evaluation."""

    sink: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="First tokens of local attention in training; null: 128, embedded 4.",
    )
    window: Positive | None = Field(
        default=None,
        description="Last tokens of local attention in training; null: 256, embedded 16.",
    )
    serve_sink: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Sink the profile asks for; null: 16, embedded 4."
    )
    serve_window: Positive | None = Field(
        default=None, description="Window the profile asks for; null: 64, embedded 16."
    )
    curriculum: CurriculumConfig = Field(default=CurriculumConfig())
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="A section, or the name of the engine alone."
    )
    trainer: dict[str, JsonValue] = Field(
        default={},
        description="Options of RlkvConfig: those of TRL's GRPOConfig, and reg, tau, "
        "advantage, collapse_steps, average_steps.",
    )

    @property
    def span(self) -> Span:
        """Sink and window of local attention in training (tokens)."""
        return resolve_span(self.sink, self.window, default_span(self.model, TRAINING_SPAN))

    @property
    def serving_span(self) -> Span:
        """Sink and window that the profile asks for (tokens)."""
        return resolve_span(
            self.serve_sink, self.serve_window, default_span(self.model, SERVING_SPAN)
        )


def load_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply changes of the command line (`override`); see `make_config`."""
    content = read_options(path, f"the YAML file of a training job ({DOCS})")
    return make_config(override(content, changes), one_line(path))


def make_config(content: Mapping[str, Any], where: str) -> TrainConfig:
    """Check the options of a job; an `RlkvError` names `where`, the key and what is allowed."""
    content = dict(content)
    refine = content.get("refine")
    if isinstance(refine, dict) and refine.get("enabled"):
        raise RlkvError(
            f"{where}: refine: refinement is a command of its own: leave the section out, and run "
            "`rlkv refine OUTPUT/profile.json` after the training"
        )
    if isinstance(refine, dict) and "enabled" in refine:  # every run.yaml of before has it
        del content["refine"]
    config = validate(TrainConfig, content, where, DOCS)
    _check_trainer(config.trainer, where)
    if config.rollout.staleness and config.rollout.engine == "transformers":
        raise RlkvError(
            f"{where}: rollout.staleness {config.rollout.staleness}: the model that is trained "
            "cannot write answers meanwhile: choose another rollout.engine, or 0"
        )
    return config


def _check_trainer(options: Mapping[str, JsonValue], where: str) -> None:
    from rlkv_vllm.training.trainer import RlkvConfig

    known = {field.name: field.default for field in dataclasses.fields(RlkvConfig) if field.init}
    for key, value in options.items():
        if key in _RESERVED:
            raise RlkvError(f"{where}: trainer.{key} is set by the job: leave it out")
        if key not in known:
            raise RlkvError(
                f"{where}: trainer.{one_line(key, 60)} is no option of RlkvConfig: see {DOCS}, and "
                "TRL's GRPOConfig for all others"
            )
        if type(known[key]) in (int, float) and isinstance(value, str):
            raise RlkvError(f"{where}: trainer.{key} {one_line(value, 60)}: must be a number")
