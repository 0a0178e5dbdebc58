"""Options of who writes the answers that a training job trains on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from rlkv_vllm.options import Section


class RolloutConfig(Section):
    """Who writes the answers that are trained on."""

    engine: Literal["transformers", "vllm-colocate", "vllm-server"] = Field(
        default="transformers",
        description="`transformers`: generate of the model that is trained. `vllm-colocate`: vLLM "
        "in gated mode, a process beside it. `vllm-server`: `rlkv serve --mode gated` elsewhere.",
    )
    servers: list[str] = Field(
        default=["http://127.0.0.1:8000"],
        description="Addresses for `vllm-server`; answers are shared among them.",
    )
    staleness: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="By how many steps the gates that sampled an answer may be older than the "
        "step that trains on it; above 0 the engine writes the next answers meanwhile.",
    )
    options: dict[str, JsonValue] = Field(
        default={},
        description="Engine arguments of vLLM for `vllm-colocate`, e.g. max_model_len, "
        "kv_cache_memory_bytes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"engine": value} if isinstance(value, str) else value
