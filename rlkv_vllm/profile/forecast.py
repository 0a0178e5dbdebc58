"""How much cache a model needs with a head profile."""

from __future__ import annotations

from collections.abc import Sequence

from rlkv_vllm.allocation.forecast import CacheGeometry, Forecast, block_sizes_for, forecast_split
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
    """The cache that the engine builds for a profile, with its choice of the block size.

    `block_sizes` are those to choose from, the fastest first; None: the kernels' preferred sizes.

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
