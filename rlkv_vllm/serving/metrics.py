"""The split cache in vLLM's ``/metrics``: a stat logger plugin of vLLM.

With ``--api-server-count`` above 1 the engine reports each step to only one of the
processes; prometheus_client's files then hold the figures of all of them.
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


class _Series(NamedTuple):
    """What one engine's steps change; looked up once, because `labels()` is slow."""

    running: Gauge
    preemptions: Counter
    use: _UseSeries | None


class _UseSeries(NamedTuple):
    full: Gauge
    streaming: Gauge
    full_cache: Gauge
    saved: Gauge
    evictions: Counter
    full_hits: Counter
    streaming_hits: Counter


class RlkvStatLogger(AggregateStatLoggerBase):
    """Metrics of the split cache, one series per engine.

    Without a split it exports ``rlkv:active`` 0 and nothing else. It is a collector too: vLLM
    answers ``/metrics`` in another thread than records the steps, and what one scrape tells of
    the split must be of one step.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        self._engines = {index: (model, str(index)) for index in engine_indexes}
        self._reports_use = _reports_use(vllm_config)
        self._figures: CacheFigures | None = None
        self._series: dict[int, _Series] = {}
        self._counts = dict.fromkeys(engine_indexes, (0, 0, 0, 0))
        self._lock = Lock()

        self._active = _gauge(
            "active", "1 if the split was proven at start, 0 if this server has whole caches."
        )
        for labels in self._engines.values():
            self._active.labels(*labels).set(0)
        self._profile = _gauge(
            "profile_info",
            "Head profile and split that are served; always 1.",
            "profile",
            "profile_sha256",
            "sparsity",
            "sink",
            "window",
        )
        self._heads = _gauge("heads", "KV heads of the model.", "kind")
        self._used = _gauge("cache_used_bytes", "KV cache held by requests.", "kind")
        self._capacity = _gauge("cache_capacity_bytes", "KV cache that requests can hold.")
        self._full_cache = _gauge(
            "full_cache_bytes", "What a full cache would hold for the same requests."
        )
        self._saved = _gauge(
            "cache_saved_bytes", "Bytes that the split saves the requests against a full cache."
        )
        self._running = _gauge("requests_running", "Requests in the running batch.")
        self._possible = _gauge(
            "requests_possible", "Requests of the longest length that fit at once.", "cache"
        )
        self._evictions = _counter(
            "ring_evictions", "Blocks of streaming heads that left the window and were given back."
        )
        self._preemptions = _counter(
            "preemptions", "Requests that had to start again for want of cache."
        )
        self._hits = _counter(
            "prefix_cache_hit_blocks", "Blocks of new requests taken from the prefix cache.", "kind"
        )

        self._constant = self._collect_constant()
        for collector in list(REGISTRY._collector_to_names):
            if isinstance(collector, RlkvStatLogger):  # of an engine that lived here before
                REGISTRY.unregister(collector)
        REGISTRY.register(self)

    def _collect_constant(self) -> list[Metric]:
        gauges = (self._active, self._profile, self._heads, self._capacity, self._possible)
        return [metric for gauge in gauges for metric in gauge.collect()]

    def collect(self) -> list[Metric]:
        """All metrics, as they were after one step; called by prometheus_client."""
        metrics = (
            *(self._used, self._full_cache, self._saved, self._running),
            *(self._evictions, self._preemptions, self._hits),
        )
        with self._lock:
            changing = [each for metric in metrics for each in metric.collect()]
        for each in changing:  # when a counter began nobody asks, and it takes as long to write
            each.samples = [s for s in each.samples if not s.name.endswith("_created")]
        return [each for each in (*self._constant, *changing) if each.samples]

    def show_split(self, figures: CacheFigures) -> None:
        """The split is proven: export what stays the same, and what is counted from now on."""
        self._figures = figures
        plan = figures.plan
        allocation = plan.groups.allocation
        possible = figures.requests_possible(plan.max_model_len)
        for index, labels in self._engines.items():
            self._active.labels(*labels).set(1)
            self._profile.labels(
                *labels,
                plan.profile_id,
                plan.profile.sha256(),
                f"{plan.sparsity:g}",
                plan.geometry.sink,
                plan.geometry.window,
            ).set(1)
            self._heads.labels(*labels, "full").set(allocation.num_full)
            self._heads.labels(*labels, "streaming").set(allocation.num_streaming)
            self._capacity.labels(*labels).set(figures.capacity_bytes)
            self._possible.labels(*labels, "split").set(possible.split)
            self._possible.labels(*labels, "full").set(possible.full)
            self._series[index] = self._start_series(labels)
        self._constant = self._collect_constant()

    def _start_series(self, labels: Sequence[str]) -> _Series:
        """So that the series exist before the first step.

        A step that another API process has seen already is overwritten, until the next one.
        """
        use = None
        if self._reports_use:
            use = _UseSeries(
                self._used.labels(*labels, "full"),
                self._used.labels(*labels, "streaming"),
                self._full_cache.labels(*labels),
                self._saved.labels(*labels),
                self._evictions.labels(*labels),
                self._hits.labels(*labels, "full"),
                self._hits.labels(*labels, "streaming"),
            )
            for gauge in (use.full, use.streaming, use.full_cache, use.saved):
                gauge.set(0)
        running = self._running.labels(*labels)
        running.set(0)
        return _Series(running, self._preemptions.labels(*labels), use)

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
                series.preemptions.inc(iteration_stats.num_preempted_reqs)
            if scheduler_stats:
                series.running.set(scheduler_stats.num_running_reqs)
                if use is not None and series.use is not None:
                    self._record_use(use, series.use)
                    self._counts[engine_idx] = (
                        *(use.full, use.streaming, use.full_cache),
                        scheduler_stats.num_running_reqs,
                    )

    def _record_use(self, use: BlockUse, series: _UseSeries) -> None:
        assert self._figures is not None
        size = self._figures.block_bytes
        full_cache = use.full_cache * self._figures.full_cache_block_bytes
        series.full.set(use.full * size)
        series.streaming.set(use.streaming * size)
        series.full_cache.set(full_cache)
        series.saved.set(full_cache - (use.full + use.streaming) * size)
        if use.evicted:
            series.evictions.inc(use.evicted)
        if use.full_hit:
            series.full_hits.inc(use.full_hit)
        if use.streaming_hit:
            series.streaming_hits.inc(use.streaming_hit)

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
        # vLLM's counters and histograms, which take much longer to read, are in other files.
        files = [str(path) for path in folder.glob("gauge_mostrecent_*.db")]
        for metric in MultiProcessCollector.merge(files):
            for sample in metric.samples:
                what = (sample.name, sample.labels.get("kind"))
                if what in sums:
                    sums[what] += sample.value
        return (round(sums[what] / unit[what]) for what in unit)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the endpoint plugin calls :meth:`show_split`."""


def _reports_use(vllm_config: VllmConfig) -> bool:
    return issubclass(vllm_config.scheduler_config.get_scheduler_cls(), SplitScheduler)


# Without a registry: the stat logger is the collector.
def _gauge(name: str, documentation: str, *labels: str) -> Gauge:
    return Gauge(
        _PREFIX + name,
        documentation,
        (*_LABELS, *labels),
        registry=None,
        multiprocess_mode="mostrecent",
    )


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, documentation, (*_LABELS, *labels), registry=None)
