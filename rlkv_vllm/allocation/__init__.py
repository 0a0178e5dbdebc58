"""From gates and a sparsity to full and streaming heads, cache groups, and memory."""

from rlkv_vllm.allocation.forecast import CacheGeometry, Forecast, forecast_split
from rlkv_vllm.allocation.groups import pack
from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.ring import ring_blocks

__all__ = ["CacheGeometry", "Forecast", "allocate", "forecast_split", "pack", "ring_blocks"]
