"""How much cache a model needs with a head profile."""

from __future__ import annotations

from collections.abc import Sequence

from rlkv_vllm.allocation.forecast import (
    CacheGeometry,
    Forecast,
    block_sizes_for,
    forecast_split,
)
from rlkv_vllm.profile.schema import HeadProfile


def forecast_profile(
    profile: HeadProfile,
    sparsity: float,
    *,
    dtype_bytes: int,
    max_model_len: int,
    block_sizes: Sequence[int] | None = None,
    sink: int | None = None,
    window: int | None = None,
    tp_size: int = 1,
) -> Forecast:
    """What the engine makes of a profile, its own choice of the block size included.

    Args:
        profile: gates, shape of the model, sink and window.
        sparsity: share of streaming heads.
        dtype_bytes: of the cache; 1 is an 8-bit cache.
        max_model_len: longest request (tokens).
        block_sizes: to choose from, the fastest first; None: those that the kernels like.
        sink: instead of the profile's.
        window: instead of the profile's.
        tp_size: tensor-parallel ranks.

    Raises:
        RlkvError: as `allocate`.
    """
    model = profile.model
    sizes = block_sizes or block_sizes_for(model.head_dim, is_fp8=dtype_bytes == 1)
    geometry = CacheGeometry(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype_bytes=dtype_bytes,
        block_size=sizes[0],
        sink=profile.sink if sink is None else sink,
        window=profile.window if window is None else window,
    )
    return forecast_split(
        profile.gates,
        sparsity,
        geometry,
        block_sizes=sizes,
        tp_size=tp_size,
        max_model_len=max_model_len,
    )
