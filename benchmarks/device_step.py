"""Schedulers whose steps wait for RLKV_DEVICE_MS, as for a device that computes elsewhere."""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from rlkv_vllm.engine.cache.scheduler import SplitScheduler

_DEVICE_S = float(os.environ["RLKV_DEVICE_MS"]) / 1e3


class _Waiting:
    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(_DEVICE_S)
        return super().update_from_output(*args, **kwargs)  # type: ignore[misc]


class StockDevice(_Waiting, Scheduler):
    """Of vLLM."""


class SplitDevice(_Waiting, SplitScheduler):
    """Of the split cache."""
