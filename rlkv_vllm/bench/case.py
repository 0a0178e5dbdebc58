"""A case of the benchmark, its metrics, and what is known before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlkv_vllm.allocation.forecast import Forecast
from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.planning.roofline import Device, HeadCache, ModelSize, Roofline

STOCK, SPLIT, ALL_FULL = "stock", "split", "all-full"

#: Plain JSON values that say what is measured.
Point = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One figure of a case.

    Attributes:
        key: its name in the results.
        label: column of the report, unit included.
        more_is_better: whether larger is better.
        scale: from the results' unit to the label's.
        is_ratio_shown: whether the report compares split with stock by it.
    """

    key: str
    label: str
    more_is_better: bool = False
    scale: float = 1.0
    is_ratio_shown: bool = True

    def gain(self, stock: float, split: float) -> float | None:
        """How much better `split` is, above 1 if it is; None if one of them is 0."""
        better, worse = (split, stock) if self.more_is_better else (stock, split)
        return better / worse if worse and better else None


@dataclass(frozen=True)
class Setup:
    """Model, cache and engine, as known before anything is measured.

    Attributes:
        model: sizes of the model.
        forecasts: of the split at its sparsity and of the all-full profile, by variant.
        memory_bytes: KV cache of every engine.
        max_model_len: longest request.
        max_num_seqs: most requests at once.
        stock_block_size: tokens per block of stock vLLM.
        task: whose problems the case `solve` takes.
        turn_seconds: length of a turn of the case `capacity`.
        has_tokenizer: whether the model has one.
    """

    model: ModelSize
    forecasts: Mapping[str, Forecast]
    memory_bytes: int
    max_model_len: int
    max_num_seqs: int
    stock_block_size: int
    task: str
    turn_seconds: float
    has_tokenizer: bool

    def cache(self, variant: str) -> HeadCache:
        """The keys and values that attention of a variant reads."""
        return HeadCache.of(self.forecasts[ALL_FULL if variant == STOCK else variant], self.model)

    def roofline(self, device: Device, variant: str) -> Roofline:
        """Bounds of a variant's steps."""
        return Roofline(device, self.model, self.cache(variant))

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
    the engines' processes it is prepared, takes turns, and is finished, one point at a time. What
    takes turns is an `Engine`, or a `Server` where `runs_servers`.
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
    #: Whether servers take turns instead of engines.
    runs_servers: ClassVar[bool] = False

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """What to measure, `full` or in a few minutes, including points too large for the cache."""
        raise NotImplementedError

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Why a point cannot be measured with this memory, or None."""
        return None

    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Gains that the roofline expects, by metric; none where it says nothing."""
        return {}

    def prepare(self, engine: Any, point: Point) -> Any:
        """Bring the engine to where turns can start; the result is given to each turn."""
        return None

    def turn(self, engine: Any, point: Point, state: Any) -> dict[str, float]:
        """Measure once: figures by metric, and others worth keeping."""
        raise NotImplementedError

    def finish(self, engine: Any, state: Any) -> None:
        """Leave the engine idle."""
        engine.drain()
