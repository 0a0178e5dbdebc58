"""The format of head profiles; the JSON Schema in `docs/` is generated from these models."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

SCHEMA_VERSION: Literal[1] = 1

_MAX_COUNT = 2**31 - 1  # what a C int of the kernels holds

Count = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _optional(description: str, **bounds: Any) -> Any:
    """A field left out where unknown, not null: files without it keep text and SHA-256."""
    return Field(
        default=None, exclude_if=lambda value: value is None, description=description, **bounds
    )


class _Record(BaseModel):
    """Immutable; refuses unknown keys, and numbers that JSON cannot hold, at any depth."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelFingerprint(_Record):
    """Which model the gates belong to, and the architecture that must match to use them."""

    id: str = Field(min_length=1, description="Base model: Hugging Face id or a local name.")
    revision: str | None = Field(
        default=None, description="Commit or tag of the base model, if known."
    )
    model_type: str = Field(min_length=1, description="`model_type` of the model's config.json.")
    num_layers: Count = Field(description="Decoder layers.")
    num_query_heads: Count = Field(description="Query heads per layer.")
    num_kv_heads: Count = Field(description="KV heads per layer.")
    head_dim: Count = Field(description="Size of one head.")


class Provenance(_Record):
    """How, when and from what the gates were made."""

    method: str = Field(
        min_length=1,
        description="The scorer that made the gates, e.g. `head-importance`, `rlkv`, "
        "`duo-attention`.",
    )
    source: str | None = Field(default=None, description="Paper, URL or file they come from.")
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description="Every setting of the run that made the gates."
    )
    seed: int | None = Field(default=None, description="Random seed of that run.")
    versions: dict[str, str] = Field(
        default_factory=dict, description="Package name to version, as used by that run."
    )
    created: date = Field(description="Day the profile was made (ISO 8601).")
    data: str | None = Field(default=None, description="Data set the gates were made on.")


class PairedCounts(_Record):
    """How answers differ from those with the full cache to the same problems."""

    gained: int = Field(ge=0, description="Answers correct here and not with the full cache.")
    lost: int = Field(ge=0, description="Answers correct with the full cache and not here.")
    newly_cut: int = Field(ge=0, description="Answers cut off here and not with the full cache.")
    no_longer_cut: int = Field(
        ge=0, description="Answers cut off with the full cache and not here."
    )
    tokens_error: float | None = _optional(
        "Standard error of the logarithm of the ratio of mean output tokens, here to full cache; "
        "enlarged to allow for answers of the length cap that are too rare to be seen.",
        ge=0.0,
    )
    design_effect: float | None = _optional(
        "With several samples per problem: what `gained`, `lost` and the number of answers are "
        "divided by before bounds are computed.",
        ge=1.0,
    )
    cut_design_effect: float | None = _optional("The same for answers cut off.", ge=1.0)
    level: float | None = _optional(
        "One-sided error level of bounds from this row: below the usual 0.05 where the evaluation "
        "could stop early.",
        gt=0.0,
        le=0.05,
    )


class EvaluationRow(_Record):
    """One measurement of the profile at one sparsity."""

    task: str = Field(min_length=1, description="Name of the task or benchmark.")
    n: Count = Field(description="Problems answered for this row.")
    sparsity: Share = Field(description="Share of KV heads that were streaming heads.")
    accuracy: Share = Field(description="Share of answers that were correct at that sparsity.")
    full_accuracy: Share = Field(description="Share correct with the full cache.")
    mean_output_tokens: float = Field(ge=0.0, description="Mean length of the answers, in tokens.")
    p95_output_tokens: int | None = _optional(
        "95th percentile of the lengths, in tokens.", ge=0, le=_MAX_COUNT
    )
    capped_share: Share | None = _optional("Share of the answers that the length cap cut off.")
    max_tokens: Count | None = _optional("Length cap of an answer, in tokens.")
    temperature: float | None = _optional("Sampling temperature, 0 for greedy decoding.", ge=0.0)
    top_p: Share | None = _optional("Share of the probability that was sampled from, if below 1.")
    top_k: Count | None = _optional("Tokens that were sampled from, if not all.")
    min_p: Share | None = _optional("Least probability relative to the likeliest token, if any.")
    repetition_penalty: float | None = _optional("Repetition penalty, if any.", gt=0.0)
    samples: Count | None = _optional("Answers per problem, if more than one.")
    seconds_per_solved: float | None = _optional(
        "Wall time of the run through the served engine, all problems in flight together, divided "
        "by the problems solved. Depends on the machine.",
        ge=0.0,
    )
    seed: int | None = _optional("Random seed of the problems.")
    full_mean_output_tokens: float | None = _optional(
        "Mean length of the answers with the full cache, in tokens.", ge=0.0
    )
    full_capped_share: Share | None = _optional("Share cut off with the full cache.")
    kv_cache_dtype: str | None = _optional(
        "Type of the KV cache, if not the model's own.", min_length=1
    )
    allocation: str | None = _optional(
        "Digest of the full heads, sink and window that were measured.", pattern="^[0-9a-f]{64}$"
    )
    paired: PairedCounts | None = _optional("Comparison with the full cache, answer by answer.")

    @model_validator(mode="after")
    def _counts_fit_the_shares(self) -> Self:
        if (paired := self.paired) is None:
            return self
        answers = self.n * (self.samples or 1)
        self._fit("gained", "accuracy", paired.gained, paired.lost, answers)
        self._fit("newly_cut", "capped_share", paired.newly_cut, paired.no_longer_cut, answers)
        return self

    def _fit(self, name: str, share: str, here: int, there: int, answers: int) -> None:
        """Refuse counts that no answers have: `here` alone and `there` alone, at the full cache."""
        if here + there > answers:
            raise ValueError(
                f"paired.{name} {here} and its opposite {there} exceed the {answers} answers"
            )
        now, full = getattr(self, share), getattr(self, f"full_{share}")
        if now is None or full is None:
            return
        # Half an answer: shares may be rounded.
        wrong = abs((now - full) * answers - (here - there)) > 0.5
        if wrong or here > now * answers + 0.5 or there > (1 - now) * answers + 0.5:
            raise ValueError(
                f"paired.{name} {here} and its opposite {there} of {answers} answers contradict "
                f"{share} {now:g} and full_{share} {full:g}: measure again with `rlkv eval`"
            )


class HeadProfile(_Record):
    """A score for every KV head of a model, and how to serve it with a split cache."""

    model_config = ConfigDict(title="rlkv_vllm head profile")

    schema_version: Literal[1] = Field(
        default=SCHEMA_VERSION, description="Version of this format."
    )
    model: ModelFingerprint = Field(description="The model the gates belong to.")
    gates: list[list[Share]] = Field(
        min_length=1,
        description="Gate of every KV head, [layers][KV heads], in [0, 1]. Heads with the "
        "highest gates keep every token (full heads); the others keep sink and window "
        "only (streaming heads).",
    )
    sink: int = Field(
        ge=0, le=_MAX_COUNT, description="First tokens that a streaming head always sees."
    )
    window: Count = Field(
        description="Last tokens that a streaming head sees, the current one included."
    )
    provenance: Provenance = Field(description="How the gates were made.")
    evaluation: list[EvaluationRow] = Field(
        default_factory=list, description="Accuracy measured with these gates."
    )
    recommended_sparsity: Share | None = Field(
        default=None, description="Sparsity to serve at if the user names none."
    )

    @model_validator(mode="after")
    def _gates_fit_the_model(self) -> Self:
        layers, heads = self.model.num_layers, self.model.num_kv_heads
        if len(self.gates) != layers:
            raise ValueError(
                f"gates has {len(self.gates)} rows but model.num_layers is {layers}: "
                "one row per layer is needed"
            )
        for layer, row in enumerate(self.gates):
            if len(row) != heads:
                raise ValueError(
                    f"gates row {layer} has {len(row)} columns but model.num_kv_heads is "
                    f"{heads}: one gate per KV head is needed"
                )
        if self.model.num_query_heads % heads:
            raise ValueError(
                f"model.num_query_heads {self.model.num_query_heads} is not a multiple of "
                f"model.num_kv_heads {heads}"
            )
        return self

    def sha256(self) -> str:
        """Hex digest of the canonical JSON (sorted keys, no spaces, UTF-8)."""
        text = json.dumps(
            self.model_dump(mode="json"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )
        return hashlib.sha256(text.encode()).hexdigest()


def json_schema_text() -> str:
    """The JSON Schema of the format, as published in `docs/head_profile.schema.json`."""
    schema = HeadProfile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"
