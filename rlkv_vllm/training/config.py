"""Configuration of a profile job: one schema for YAML file, command line and `run.yaml`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from rlkv_vllm.allocation.span import SERVING_SPAN, TRAINING_SPAN, Span, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, write_text_atomic
from rlkv_vllm.models import default_span
from rlkv_vllm.rollouts.config import RolloutConfig
from rlkv_vllm.search.config import RefineConfig

RUN_FILE = "run.yaml"
#: What `trainer` may not set: the job decides it.
_RESERVED = (
    "output_dir",
    "seed",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "beta",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "disable_tqdm",
    "do_eval",
    "eval_strategy",
    "load_best_model_at_end",
    "num_iterations",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskConfig(_Section):
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


class CurriculumConfig(_Section):
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


class EvaluationConfig(_Section):
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
    batch_size: Positive = Field(default=64, description="Problems answered together.")


class TrainConfig(_Section):
    """A profile job: model, problems, gate training, evaluation."""

    model: str = Field(default="embedded", description="`embedded`, a folder, or org/name.")
    revision: str | None = Field(default=None, description="Commit, branch or tag on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the frozen weights; auto: float32 on CPU, else as stored."
    )
    output: Path = Field(description="Folder of the run.")
    seed: int = Field(default=0, description="Of problems, rollouts and data order.")
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
    task: TaskConfig = Field(default=TaskConfig())
    curriculum: CurriculumConfig = Field(default=CurriculumConfig())
    refine: RefineConfig = Field(default=RefineConfig())
    evaluation: EvaluationConfig = Field(default=EvaluationConfig())
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="A section, or the name of the engine alone."
    )
    trainer: dict[str, JsonValue] = Field(
        default={},
        description="Options of RlkvConfig: those of TRL's GRPOConfig, and reg, tau, "
        "collapse_steps, average_steps.",
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: the file.
        overrides: `key=value` with dots between sections, e.g. `trainer.learning_rate=0.01`;
            values are YAML.

    Raises:
        RlkvError: naming file or override, the key and what is allowed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RlkvError(
            f"{path}: no such file: give the YAML file of a profile job (docs/training.md)"
        ) from error
    except OSError as error:
        raise RlkvError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RlkvError(f"{path}: not valid YAML ({one_line(error)}): mend it") from error
    if not isinstance(content, dict):
        raise RlkvError(f"{path}: holds no mapping: give `key: value` lines (docs/training.md)")
    for override in overrides:
        _apply(content, override)
    return make_config(content, str(path))


def make_config(content: Mapping[str, Any], where: str) -> TrainConfig:
    """Check the values of a job.

    Raises:
        RlkvError: naming `where`, the key and what is allowed.
    """
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RlkvError(
            f"{where}: {key}: {first['msg']} (given {one_line(repr(first['input']), 60)}): "
            "see docs/training.md for every option"
        ) from error
    _check_trainer(config.trainer, where)
    if config.refine.start is not None and not config.refine.enabled:
        raise RlkvError(f"{where}: refine.start needs refine.enabled: give both")
    if config.rollout.staleness and config.rollout.engine == "transformers":
        raise RlkvError(
            f"{where}: rollout.staleness {config.rollout.staleness}: the model that is trained "
            "cannot write answers meanwhile: choose another rollout.engine, or 0"
        )
    return config.model_copy(update={"trainer": _numbers(config.trainer, where)})


def save_run(config: TrainConfig, path: Path) -> None:
    """Write `run.yaml`: `rlkv train` of it makes the same run again."""
    versions = ", ".join(f"{name} {version}" for name, version in job_versions().items())
    header = (
        f"# Written by: {shlex.join(['rlkv', *sys.argv[1:]])}\n"
        f"# Versions: {versions}\n"
        "# The configuration as used; `rlkv train` takes it as it is.\n"
    )
    body = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    write_text_atomic(path, header + body)


def job_versions() -> dict[str, str]:
    """Package name to version, of what decides a run."""
    names = ("rlkv-vllm", "torch", "transformers", "trl", "accelerate")
    return {name: importlib.metadata.version(name) for name in names}


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RlkvError(f"--set {override}: give key=value, e.g. --set trainer.learning_rate=0.01")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RlkvError(f"--set {override}: {section} is no section of the configuration")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RlkvError(f"--set {override}: value is not YAML ({one_line(error)})") from error


def _numbers(options: Mapping[str, JsonValue], where: str) -> dict[str, JsonValue]:
    """`options` with numbers where numbers belong: YAML takes `1e-2` for a text."""
    from rlkv_vllm.training.trainer import RlkvConfig

    defaults = {field.name: field.default for field in dataclasses.fields(RlkvConfig)}
    found: dict[str, JsonValue] = {}
    for key, value in options.items():
        kind = type(defaults[key])
        if isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError as error:
                raise RlkvError(
                    f"{where}: trainer.{key} {one_line(value, 60)}: must be a number"
                ) from error
        found[key] = value
    return found


def _check_trainer(options: Mapping[str, JsonValue], where: str) -> None:
    from rlkv_vllm.training.trainer import RlkvConfig

    known = {field.name for field in dataclasses.fields(RlkvConfig) if field.init}
    for key in options:
        if key in _RESERVED:
            raise RlkvError(f"{where}: trainer.{key} is set by the job: leave it out")
        if key not in known:
            raise RlkvError(
                f"{where}: trainer.{key} is no option of RlkvConfig: see docs/training.md, and "
                "TRL's GRPOConfig for all others"
            )
