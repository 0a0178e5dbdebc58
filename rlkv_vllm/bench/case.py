"""A case of the benchmark, its metrics, and what is known before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlkv_vllm.allocation.forecast import Forecast
from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.planning.roofline import Device, HeadCache, ModelSize, Roofline

#: Variants of an engine; the last two write the answers of a training job.
STOCK, SPLIT, ALL_FULL, TRANSFORMERS, VLLM = "stock", "split", "all-full", "transformers", "vllm"

#: What takes turns.
Kind = Literal["engine", "server", "rollouts"]

#: Plain JSON values that say what is measured.
Point = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One figure of a case, named `key` in its results."""

    key: str
    label: str  # column of the report, unit included
    more_is_better: bool = False
    scale: float = 1.0  # from the results' unit to the label's
    is_ratio_shown: bool = True

    def gain(self, first: float, second: float) -> float | None:
        """How much better `second` is, above 1 if it is; None if one of them is 0."""
        better, worse = (second, first) if self.more_is_better else (first, second)
        return better / worse if worse and better else None


@dataclass(frozen=True)
class Setup:
    """Model, cache and engine, as known before anything is measured."""

    model: ModelSize
    forecasts: Mapping[str, Forecast]  # of the split at its sparsity and of the all-full profile
    memory_bytes: int  # KV cache of every engine
    max_model_len: int
    max_num_seqs: int
    stock_block_size: int
    task: str  # whose problems are solved
    turn_seconds: float  # of the case `capacity`
    has_tokenizer: bool

    def roofline(self, device: Device, variant: str) -> Roofline:
        """Bounds of a variant's steps; without a forecast of its own it has full caches."""
        forecast = self.forecasts.get(variant, self.forecasts[ALL_FULL])
        return Roofline(device, self.model, HeadCache.of(forecast, self.model))

    def lacks(self, requests: int, tokens: int) -> str | None:
        """Which flag must grow for so many requests of `tokens` in a full cache, or None."""
        if requests > self.max_num_seqs:
            return f"--max-num-seqs {requests}"
        if tokens >= self.max_model_len:
            return f"--max-model-len {tokens + 1}"
        blocks = requests * self.blocks_per_request(STOCK, tokens) + 1
        if blocks <= self.blocks(STOCK):
            return None
        need = blocks * self.stock_block_size * self.model.token_bytes
        return f"--memory {need / 2**30:.1f}GiB" if need >= 2**30 else f"--memory {need >> 20}MiB"

    def blocks(self, variant: str) -> int:
        """Blocks of a variant's pool."""
        if variant == STOCK:
            return self.memory_bytes // (self.model.token_bytes * self.stock_block_size)
        return self.forecasts[variant].num_blocks(self.memory_bytes)

    def blocks_per_request(self, variant: str, tokens: int) -> int:
        """Blocks that a request of `tokens` holds."""
        if variant == STOCK:
            return num_blocks(tokens, self.stock_block_size)
        return self.forecasts[variant].blocks_per_request(tokens)


class Case:
    """One question, measured at several points.

    In the parent process a case chooses its points and says which gains the roofline expects. In
    the engines' processes it is prepared and takes turns, one point at a time. What takes turns is
    an `Engine`, a `Server` or a `Writer`, as `runs` says.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    #: What the figures mean, for the report.
    note: ClassVar[str] = ""
    variants: ClassVar[tuple[str, str]] = (STOCK, SPLIT)
    metrics: ClassVar[tuple[Metric, ...]]
    #: Columns of a point, with their names in the report.
    columns: ClassVar[Mapping[str, str]] = {}
    #: Whether each turn starts an engine of its own.
    starts_engines: ClassVar[bool] = False
    runs: ClassVar[Kind] = "engine"

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """What to measure, `full` or in a few minutes, including points too large for the cache."""
        raise NotImplementedError

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Why a point cannot be measured with this memory, or None."""
        return None

    def seconds(self, roofline: Roofline, point: Point) -> float:
        """Roofline of what the first metric measures; 0 where it says nothing."""
        return 0.0

    def expected(self, setup: Setup, device: Device, point: Point) -> dict[str, float]:
        """Gains that the roofline expects, by metric."""
        first, second = (self.seconds(setup.roofline(device, v), point) for v in self.variants)
        return {self.metrics[0].key: first / second} if second else {}

    def prepare(self, engine: Any, point: Point) -> Any:
        """Bring the engine to where turns can start; the result is given to each turn."""
        return None

    def turn(self, engine: Any, point: Point, state: Any) -> dict[str, float]:
        """Measure once: figures by metric, and others worth keeping."""
        raise NotImplementedError
