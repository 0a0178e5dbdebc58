"""Split plans made for tests, without an engine."""

from types import SimpleNamespace
from typing import Any

from rlkv_vllm.allocation import CacheGeometry, Forecast, allocate, pack, ring_blocks
from rlkv_vllm.engine.config import SplitPlan
from tests.support.profiles import make_profile

BLOCK, LENGTH, BLOCKS = 16, 512, 200


def make_plan(tp_size: int = 1) -> SplitPlan:
    profile = make_profile(layers=4, heads=2)
    allocation = allocate(profile.gates, 0.5, tp_size)
    geometry = CacheGeometry(
        num_layers=4,
        num_kv_heads=2,
        head_dim=64,
        dtype_bytes=2,
        block_size=BLOCK,
        sink=profile.sink,
        window=profile.window,
    )
    groups = pack(
        allocation,
        full_blocks=LENGTH // BLOCK,
        ring_blocks=ring_blocks(LENGTH, profile.sink, profile.window, BLOCK),
    )
    return SplitPlan(
        profile=profile,
        profile_id="p",
        sparsity=0.5,
        forecast=Forecast(geometry, groups),
        retention_interval=256,
        max_model_len=LENGTH,
    )


def vllm_config(scheduler: type | None = None) -> Any:
    """What the serving layer reads of vLLM's configuration."""
    from rlkv_vllm.engine.cache.scheduler import SplitScheduler

    return SimpleNamespace(
        additional_config={"rlkv": {"profile": "heads.json"}},
        model_config=SimpleNamespace(served_model_name="m"),
        scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: scheduler or SplitScheduler),
    )
