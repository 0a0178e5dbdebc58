"""The split cache in vLLM's ``/metrics``: a stat logger plugin of vLLM.

With ``--api-server-count`` above 1 the engine reports each step to one of the processes only;
prometheus_client's files then hold the figures of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import REGISTRY, Counter, Gauge, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from rlkv_vllm.engine.cache.scheduler import BlockUse, SplitScheduler
from rlkv_vllm.serving.status import ByKind, CacheFigures, CacheUse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

_PREFIX = "rlkv:"
_LABELS = ("model_name", "engine")
_USED, _FULL_CACHE, _RUNNING = (
    _PREFIX + name for name in ("cache_used_bytes", "full_cache_bytes", "requests_running")
)


#: Name -> help text and labels. Those of the first table do not change while the server runs.
_CONSTANT = {
    "active": ("1 if the split was proven at start, 0 if this server has full caches.",),
    "profile_info": (
        "Head profile and split that are served; always 1.",
        *("profile", "profile_sha256", "sparsity", "sink", "window"),
    ),
    "heads": ("KV heads of the model.", "kind"),
    "cache_capacity_bytes": ("KV cache that requests can hold.",),
    "requests_possible": ("Requests of the longest length that fit at once.", "cache"),
}
_CHANGING = {
    "cache_used_bytes": ("KV cache held by requests.", "kind"),
    "full_cache_bytes": ("What a full cache would hold for the same requests.",),
    "cache_saved_bytes": ("Bytes that the split saves the requests against a full cache.",),
    "requests_running": ("Requests in the running batch.",),
}
_COUNTED = {
    "ring_evictions": ("Blocks of streaming heads that left the window and were freed.",),
    "preemptions": ("Requests that had to start again because the cache was full.",),
    "prefix_cache_hit_blocks": ("Blocks of new requests taken from the prefix cache.", "kind"),
}
_KINDS: tuple[tuple[str, ...], ...] = (("full",), ("streaming",))


class _Series(NamedTuple):
    """What the steps of one engine change, by name and kind; `labels()` is slow."""

    gauges: dict[tuple[str, ...], Gauge]
    counters: dict[tuple[str, ...], Counter]


class RlkvStatLogger(AggregateStatLoggerBase):
    """Metrics of the split cache, one series per engine.

    Without a split it exports ``rlkv:active`` 0 and nothing else. It is a collector as well: vLLM
    answers ``/metrics`` in another thread than it records steps in, and one scrape must show one
    step.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        self._engines = {index: (model, str(index)) for index in engine_indexes}
        self._reports_use = issubclass(
            vllm_config.scheduler_config.get_scheduler_cls(), SplitScheduler
        )
        self._figures: CacheFigures | None = None
        self._series: dict[int, _Series] = {}
        self._counts = dict.fromkeys(engine_indexes, (0, 0, 0, 0))
        self._lock = Lock()
        # Without a registry: this object is the collector.
        self._gauges = {
            name: Gauge(
                _PREFIX + name,
                text,
                (*_LABELS, *labels),
                registry=None,
                multiprocess_mode="mostrecent",
            )
            for name, (text, *labels) in (_CONSTANT | _CHANGING).items()
        }
        self._counters = {
            name: Counter(_PREFIX + name, text, (*_LABELS, *labels), registry=None)
            for name, (text, *labels) in _COUNTED.items()
        }
        for labels in self._engines.values():
            self._gauges["active"].labels(*labels).set(0)
        self._constant = self._collect_constant()
        for collector in list(REGISTRY._collector_to_names):
            if isinstance(collector, RlkvStatLogger):  # of an engine that lived here before
                REGISTRY.unregister(collector)
        REGISTRY.register(self)

    def _collect_constant(self) -> list[Metric]:
        return [metric for name in _CONSTANT for metric in self._gauges[name].collect()]

    def collect(self) -> list[Metric]:
        """All metrics, as they were after one step; called by prometheus_client."""
        metrics = (*(self._gauges[name] for name in _CHANGING), *self._counters.values())
        with self._lock:
            changing = [each for metric in metrics for each in metric.collect()]
        for each in changing:  # nobody reads when a counter began, and it doubles the output
            each.samples = [s for s in each.samples if not s.name.endswith("_created")]
        return [each for each in (*self._constant, *changing) if each.samples]

    def show_split(self, figures: CacheFigures) -> None:
        """The split is proven: export what stays the same, and start counting."""
        self._figures = figures
        plan = figures.plan
        allocation = plan.groups.allocation
        possible = figures.requests_possible(plan.max_model_len)
        span = plan.geometry.sink, plan.geometry.window
        profile = plan.profile_id, plan.profile.sha256(), f"{plan.sparsity:g}", *span
        constant: dict[tuple[str, ...], int] = {
            ("active",): 1,
            ("profile_info", *map(str, profile)): 1,
            ("heads", "full"): allocation.num_full,
            ("heads", "streaming"): allocation.num_streaming,
            ("cache_capacity_bytes",): figures.capacity_bytes,
            ("requests_possible", "split"): possible.split,
            ("requests_possible", "full"): possible.full,
        }
        for index, labels in self._engines.items():
            for (name, *rest), value in constant.items():
                self._gauges[name].labels(*labels, *rest).set(value)
            self._series[index] = self._start_series(labels)
        self._constant = self._collect_constant()

    def _start_series(self, labels: Sequence[str]) -> _Series:
        """Make the series exist before the first step.

        This overwrites a step that another API process has seen already, until the next step.
        """
        always = ("requests_running", "preemptions")  # the others come from our scheduler
        keys: list[tuple[str, ...]] = [
            (name, *kind)
            for name, (_, *kinds) in (_CHANGING | _COUNTED).items()
            if self._reports_use or name in always
            for kind in (_KINDS if kinds else ((),))
        ]
        gauges = {k: self._gauges[k[0]].labels(*labels, *k[1:]) for k in keys if k[0] in _CHANGING}
        counters = {
            k: self._counters[k[0]].labels(*labels, *k[1:]) for k in keys if k[0] in _COUNTED
        }
        for gauge in gauges.values():
            gauge.set(0)
        return _Series(gauges, counters)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the figures of a step of one engine."""
        del mm_cache_stats
        use = BlockUse.taken_from(scheduler_stats) if scheduler_stats else None
        if self._figures is None:
            return
        series = self._series[engine_idx]
        with self._lock:
            if iteration_stats and iteration_stats.num_preempted_reqs:
                series.counters["preemptions",].inc(iteration_stats.num_preempted_reqs)
            if scheduler_stats:
                running = scheduler_stats.num_running_reqs
                series.gauges["requests_running",].set(running)
                if use is not None and self._reports_use:
                    self._record_use(use, series)
                    self._counts[engine_idx] = (use.full, use.streaming, use.full_cache, running)

    def _record_use(self, use: BlockUse, series: _Series) -> None:
        assert self._figures is not None
        size = self._figures.block_bytes
        full_cache = use.full_cache * self._figures.full_cache_block_bytes
        series.gauges["cache_used_bytes", "full"].set(use.full * size)
        series.gauges["cache_used_bytes", "streaming"].set(use.streaming * size)
        series.gauges["full_cache_bytes",].set(full_cache)
        series.gauges["cache_saved_bytes",].set(full_cache - (use.full + use.streaming) * size)
        for key, count in (
            (("ring_evictions",), use.evicted),
            (("prefix_cache_hit_blocks", "full"), use.full_hit),
            (("prefix_cache_hit_blocks", "streaming"), use.streaming_hit),
        ):
            if count:
                series.counters[key].inc(count)

    def cache_use(self) -> CacheUse | None:
        """The cache now, of all engines of this server; None if no scheduler reports it."""
        if self._figures is None or not self._reports_use:
            return None
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            counts: Iterable[int] = self._counts_of_all_processes(Path(folder))
        else:
            counts = map(sum, zip(*self._counts.values(), strict=True))
        full, streaming, full_cache, running = counts
        return self._figures.use(ByKind(full=full, streaming=streaming), full_cache, running)

    def _counts_of_all_processes(self, folder: Path) -> Iterable[int]:
        assert self._figures is not None
        size = self._figures.block_bytes
        unit = {
            (_USED, "full"): size,
            (_USED, "streaming"): size,
            (_FULL_CACHE, None): self._figures.full_cache_block_bytes,
            (_RUNNING, None): 1,
        }
        sums = dict.fromkeys(unit, 0.0)
        # vLLM's counters and histograms are in other files, which take much longer to read.
        files = [str(path) for path in folder.glob("gauge_mostrecent_*.db")]
        for metric in MultiProcessCollector.merge(files):
            for sample in metric.samples:
                what = (sample.name, sample.labels.get("kind"))
                if what in sums:
                    sums[what] += sample.value
        return (round(sums[what] / unit[what]) for what in unit)

    def log_engine_initialized(self) -> None:
        """Nothing to log: the endpoint plugin calls :meth:`show_split`."""
