"""From vLLM's configuration to the plan of the split cache.

The user's options come in ``additional_config["rlkv"]``. All that can be refused without loading
weights is refused here, so that the serve command, the Python API and every worker process give the
same errors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlkv_vllm.allocation.forecast import (
    BLOCK_SIZE_MULTIPLE,
    FP8_BLOCK_SIZE_MULTIPLE,
    CacheGeometry,
    Forecast,
)
from rlkv_vllm.allocation.groups import CacheGroups
from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.allocation.span import TRAINING_SPAN
from rlkv_vllm.engine.compat import block_size_is_the_users
from rlkv_vllm.engine.support import (
    FP8_CACHE_DTYPES,
    cache_is_the_models,
    check_gated_supported,
    check_supported,
)
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import evaluation_words, fingerprint_from_config
from rlkv_vllm.options import Positive, Section, validate
from rlkv_vllm.profile.budget import asked_budget
from rlkv_vllm.profile.choice import ProfileChoice, choose_profile
from rlkv_vllm.profile.evidence import Target, Within
from rlkv_vllm.profile.forecast import forecast_profile
from rlkv_vllm.profile.io import check_matches
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.profile.schema import HeadProfile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "rlkv"
GATED = "gated"
_WHERE = f"additional_config['{CONFIG_KEY}']"

#: Prompt tokens between two places at which a different prompt with the same
#: beginning can resume from the prefix cache.
DEFAULT_RETENTION_INTERVAL = 256


class SplitConfig(Section):
    """``additional_config["rlkv"]`` of a served head profile; values as of `rlkv_vllm.split`, and
    the checksum of the profile that was checked at start-up.
    """

    mode: Literal["split"] = "split"
    profile: Annotated[str, Field(min_length=1)]
    sparsity: float | None = None
    max_loss: float | str | None = None
    evidence: Literal["proven", "measured"] | None = None
    sink: int | None = None
    window: int | None = None
    retention_interval: Annotated[int, Field(ge=0)] = DEFAULT_RETENTION_INTERVAL
    sha256: str | None = None


class GatedConfig(Section):
    """``additional_config["rlkv"]`` of gated mode: full caches, a gate per KV head; sink and window
    are those of local attention.
    """

    mode: Literal["gated"]
    sink: Annotated[int, Field(ge=0)] = TRAINING_SPAN.sink
    window: Positive = TRAINING_SPAN.window


@dataclass(frozen=True)
class SplitPlan:
    """What every process needs to know about the split cache of a model."""

    profile: HeadProfile
    profile_id: str  # as the user named it
    sparsity: float  # share of streaming KV heads asked for, or chosen by an accuracy budget
    forecast: Forecast
    retention_interval: int  # prompt tokens between two retained tails; 0: none
    max_model_len: int
    steps_in_flight: int = 1  # scheduled, and their results are not known yet
    within: Within | None = None  # why this sparsity, if an accuracy budget chose it

    @property
    def admission_blocks(self) -> int:
        """Blocks that must be free for the longest request."""
        return self.forecast.admission_blocks(self.max_model_len, self.steps_in_flight)

    @property
    def geometry(self) -> CacheGeometry:
        return self.forecast.geometry

    @property
    def groups(self) -> CacheGroups:
        return self.forecast.groups


def split_config(vllm_config: VllmConfig) -> SplitConfig | None:
    """The options of a split cache, or None when none is asked for."""
    raw = _options(vllm_config)
    if raw is None or raw.get("mode") == GATED:
        return None
    return validate(SplitConfig, raw, _WHERE, "help(rlkv_vllm.split)")


def gated_config(vllm_config: VllmConfig) -> GatedConfig | None:
    """The options of gated mode, of which all features are supported; None: not asked for."""
    raw = _options(vllm_config)
    if raw is None or raw.get("mode") != GATED:
        return None
    config = validate(GatedConfig, raw, _WHERE, "`rlkv serve --help`")
    check_gated_supported(vllm_config)
    return config


def _options(vllm_config: VllmConfig) -> dict[str, Any] | None:
    raw = (vllm_config.additional_config or {}).get(CONFIG_KEY)
    if raw is not None and not isinstance(raw, dict):
        raise RlkvError(
            f'{_WHERE} must be an object such as {{"profile": "embedded", "sparsity": 0.4}}, got '
            f"{type(raw).__name__}"
        )
    return raw


def split_plan(vllm_config: VllmConfig) -> SplitPlan | None:
    """The plan for this model and configuration, or None when not configured.

    Raises:
        RlkvError: no profile that fits the model and its pinned checksum, no sparsity is known, or
            the configuration uses a feature that the split cache does not support.
    """
    if (config := split_config(vllm_config)) is None:
        return None
    check_supported(vllm_config)
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    text_config = model.hf_text_config.to_dict()
    # vLLM knows best what it will run: heads may be implied by the architecture.
    text_config["num_key_value_heads"] = model.get_total_num_kv_heads()
    text_config["head_dim"] = model.get_head_size()
    plan = _plan(
        vllm_config.instance_id,
        config,
        str(model.model),
        model.revision,
        tuple(  # hashable
            sorted(item for item in text_config.items() if isinstance(item[1], str | int | float))
        ),
        vllm_config.parallel_config.tensor_parallel_size,
        None if cache_is_the_models(vllm_config) else vllm_config.cache_config.cache_dtype,
        _block_sizes(vllm_config),
        # vLLM's flag where given: its default is 0.
        vllm_config.cache_config.prefix_cache_retention_interval or config.retention_interval,
        kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model).itemsize,
        model.max_model_len,
        vllm_config.max_concurrent_batches,
    )
    window, draft = plan.geometry.window, vllm_config.num_speculative_tokens
    if draft >= window:
        # A chunk gets no blocks for what is out of the window at its end: at most a window of it
        # may be taken back.
        raise RlkvError(
            f"--speculative-config with num_speculative_tokens {draft}: a draft must be shorter "
            f"than the window of the streaming heads, {window} tokens"
        )
    return plan


def choose_pinned(config: SplitConfig, target: Target | None = None) -> ProfileChoice:
    """The profile of `config` with what it is served with by `target`.

    Raises:
        RlkvError: as `asked_budget` and `choose_profile`, or it is another profile than its
            checksum says.
    """
    budget = asked_budget(config.max_loss, config.evidence, config.sparsity)
    found = find_profile(config.profile)
    sha256 = found[0].sha256()
    if config.sha256 is not None and sha256 != config.sha256:
        raise RlkvError(
            f"--profile {config.profile}: changed since the server was started (sha256 "
            f"{sha256[:12]}..., expected {config.sha256[:12]}...): restart the server"
        )
    return choose_profile(
        config.profile,
        config.sparsity,
        sink=config.sink,
        window=config.window,
        found=found,
        budget=budget,
        target=target,
    )


@functools.lru_cache(maxsize=8)
def _plan(
    instance_id: str,
    config: SplitConfig,
    model_id: str,
    revision: str | None,
    text_config: tuple[tuple[str, Any], ...],
    tp_size: int,
    kv_cache_dtype: str | None,
    block_sizes: tuple[int, ...] | None,
    retention_interval: int,
    dtype_bytes: int,
    max_model_len: int,
    steps_in_flight: int,
) -> SplitPlan:
    # instance_id: every engine reads the profile anew, all layers of one engine the same.
    choice = choose_pinned(config, Target(tp_size, kv_cache_dtype, evaluation_words(model_id)))
    profile, path = choice.profile, Path(config.profile)
    check_matches(profile, fingerprint_from_config(dict(text_config), model_id, revision))
    forecast = forecast_profile(
        profile,
        choice.sparsity,
        dtype_bytes=dtype_bytes,
        max_model_len=max_model_len,
        block_sizes=block_sizes,
        sink=choice.span.sink,
        window=choice.span.window,
        tp_size=tp_size,
    )
    geometry = forecast.geometry
    return SplitPlan(
        profile=profile,
        profile_id=path.stem if path.suffix == ".json" else config.profile,
        sparsity=choice.sparsity,
        forecast=forecast,
        retention_interval=_fit_interval(retention_interval, geometry.window, geometry.block_size),
        max_model_len=max_model_len,
        steps_in_flight=steps_in_flight,
        within=choice.within,
    )


def _block_sizes(vllm_config: VllmConfig) -> tuple[int, ...] | None:
    """The user's block size, or None: those that the kernels like."""
    if not block_size_is_the_users(vllm_config):
        return None
    cache = vllm_config.cache_config
    is_fp8 = cache.cache_dtype in FP8_CACHE_DTYPES
    multiple = FP8_BLOCK_SIZE_MULTIPLE if is_fp8 else BLOCK_SIZE_MULTIPLE
    block_size: int = cache.block_size
    if block_size % multiple:
        raise RlkvError(
            f"--block-size {block_size}: the split cache needs a multiple of {multiple}"
            + (" with --kv-cache-dtype fp8" if is_fp8 else "; 16 or 32 waste least")
        )
    return (block_size,)


def _fit_interval(interval: int, window: int, block_size: int) -> int:
    """A multiple of the block size that leaves room between two tails, or 0."""
    if interval == 0:
        return 0
    tail = num_blocks(window - 1, block_size)
    return max(num_blocks(interval, block_size), 2 * tail, 1) * block_size
