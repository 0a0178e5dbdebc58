"""What a case of the benchmark is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlkv_vllm.allocation.forecast import Forecast
from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.bench.engine import Engine
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
        more_is_better: which way a ratio points.
        scale: from the results' unit to the label's.
        is_ratio_shown: whether split is compared with stock by it.
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
    """What is known of model, cache and engine before anything is measured.

    Attributes:
        model: sizes of the model.
        forecasts: of the split at its sparsity and of the all-full profile, by variant.
        memory_bytes: KV cache of every engine.
        max_model_len: longest request.
        max_num_seqs: most requests at once.
        stock_block_size: tokens per block of stock vLLM.
        task: whose problems are solved.
        turn_seconds: how long a turn of endless requests takes.
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
        """What attention of a variant reads."""
        return HeadCache.of(self.forecasts[ALL_FULL if variant == STOCK else variant], self.model)

    def roofline(self, device: Device, variant: str) -> Roofline:
        """Bounds of a variant's steps."""
        return Roofline(device, self.model, self.cache(variant))

    def lacks(self, requests: int, tokens: int) -> str | None:
        """What is missing for so many requests of `tokens` at once in a full cache, or None."""
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


class Case(ABC):
    """One question, measured at several points.

    In the parent process a case chooses its points and says what the roofline expects; in the
    engines' processes it is prepared, takes turns, and is finished, for one point at a time.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    #: What the figures mean, for the report.
    note: ClassVar[str] = ""
    variants: ClassVar[tuple[str, str]] = (STOCK, SPLIT)
    metrics: ClassVar[tuple[Metric, ...]]
    #: Columns of a point, with what they are called.
    columns: ClassVar[Mapping[str, str]] = {}
    #: Whether each turn starts an engine of its own.
    starts_engines: ClassVar[bool] = False
    #: Whether servers take turns instead of engines.
    runs_servers: ClassVar[bool] = False

    @abstractmethod
    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """What to measure, `full` or in a few minutes; those too large for the cache included."""

    def too_large(self, setup: Setup, point: Point) -> str | None:
        """Why a point cannot be measured with this memory, or None."""
        del setup, point
        return None

    @abstractmethod
    def expected(self, setup: Setup, device: Device, point: Point) -> Mapping[str, float]:
        """Gains that the roofline expects, by metric."""

    # ---- in an engine's process

    def prepare(self, engine: Engine, point: Point) -> Any:
        """Bring the engine to where turns can start; what it returns is given to each turn."""
        del engine, point

    @abstractmethod
    def turn(self, engine: Engine, point: Point, state: Any) -> dict[str, float]:
        """Measure once: figures by metric, and others worth keeping."""

    def finish(self, engine: Engine, state: Any) -> None:
        """Leave the engine idle."""
        del state
        engine.drain()
