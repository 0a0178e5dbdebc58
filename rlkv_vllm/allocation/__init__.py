"""From gates and a sparsity to full and streaming heads, cache groups, and memory."""

from rlkv_vllm.allocation.forecast import CacheGeometry, Forecast, forecast_split, ring_blocks
from rlkv_vllm.allocation.groups import CacheGroups, pack
from rlkv_vllm.allocation.heads import Allocation, allocate

__all__ = [
    "Allocation",
    "CacheGeometry",
    "CacheGroups",
    "Forecast",
    "allocate",
    "forecast_split",
    "pack",
    "ring_blocks",
]
