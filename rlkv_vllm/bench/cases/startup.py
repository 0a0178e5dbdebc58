"""Start-up: from nothing to an engine that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import Case, Metric, Point, Setup
from rlkv_vllm.planning.roofline import Device


class Startup(Case):
    """A new process for every turn, timed around the engine's start."""

    name = "startup"
    title = "Start-up"
    note = (
        "`engine`: `vllm.LLM(...)` until it returns, as `vllm bench startup` counts. `process`: "
        "from the start of Python to the first token. There is no roofline: equal is 1."
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("engine_seconds", "engine (s)"),
        Metric("process_seconds", "process (s)"),
    )
    starts_engines: ClassVar[bool] = True

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """One point."""
        return [{}]

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """The plugin reads a profile and no weights: as fast as stock vLLM."""
        return {"engine_seconds": 1.0, "process_seconds": 1.0}
