"""The split cache in vLLM's ``/metrics``: a stat logger plugin of vLLM.

With ``--api-server-count`` above 1 the engine reports each step to only one of the
processes; prometheus_client's files then hold the figures of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.samples import Sample
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry

from rlkv_vllm.engine.scheduler import BlockUse
from rlkv_vllm.serving.arguments import SCHEDULER
from rlkv_vllm.serving.status import ByKind, CacheFigures, CacheUse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

_PREFIX = "rlkv:"
_LABELS = ("model_name", "engine")
_KINDS = ("full", "streaming")
_USED, _FULL_CACHE, _RUNNING = (
    _PREFIX + name for name in ("cache_used_bytes", "full_cache_bytes", "requests_running")
)


class RlkvStatLogger(AggregateStatLoggerBase):
    """Metrics of the split cache, one series per engine.

    Without a split it exports ``rlkv:active`` 0 and nothing else.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        _unregister()  # an engine that lived in this process before
        model = vllm_config.model_config.served_model_name
        self._engines = {index: (model, str(index)) for index in engine_indexes}
        self._reports_use = _reports_use(vllm_config)
        self._figures: CacheFigures | None = None

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

    def show_split(self, figures: CacheFigures) -> None:
        """The split is proven: export what stays the same, and what is counted from now on."""
        self._figures = figures
        plan = figures.plan
        allocation = plan.groups.allocation
        possible = figures.requests_possible(plan.max_model_len)
        for labels in self._engines.values():
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
            # So that the series exist before the first step. A step that another API process
            # has seen already is overwritten, until the next one.
            self._running.labels(*labels).set(0)
            self._preemptions.labels(*labels)
            if self._reports_use:
                self._full_cache.labels(*labels).set(0)
                self._saved.labels(*labels).set(0)
                self._evictions.labels(*labels)
                for kind in _KINDS:
                    self._used.labels(*labels, kind).set(0)
                    self._hits.labels(*labels, kind)

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
        labels = self._engines[engine_idx]
        if iteration_stats and iteration_stats.num_preempted_reqs:
            self._preemptions.labels(*labels).inc(iteration_stats.num_preempted_reqs)
        if scheduler_stats:
            self._running.labels(*labels).set(scheduler_stats.num_running_reqs)
        if use is None:
            return
        now = self._figures.use(ByKind(full=use.full, streaming=use.streaming), use.full_cache, 0)
        self._used.labels(*labels, "full").set(now.bytes.full)
        self._used.labels(*labels, "streaming").set(now.bytes.streaming)
        self._full_cache.labels(*labels).set(now.full_cache_bytes)
        self._saved.labels(*labels).set(now.saved_bytes)
        if use.evicted:
            self._evictions.labels(*labels).inc(use.evicted)
        if use.full_hit:
            self._hits.labels(*labels, "full").inc(use.full_hit)
        if use.streaming_hit:
            self._hits.labels(*labels, "streaming").inc(use.streaming_hit)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the endpoint plugin calls :meth:`show_split`."""


def cache_use(figures: CacheFigures) -> CacheUse | None:
    """The cache now, of all engines of this server; None if no scheduler reports it."""
    used = dict.fromkeys(_KINDS, 0.0)
    full_cache = running = 0.0
    reported = False
    for sample in _samples(_USED, _FULL_CACHE, _RUNNING):
        if sample.name == _USED:
            used[sample.labels["kind"]] += sample.value
            reported = True
        elif sample.name == _FULL_CACHE:
            full_cache += sample.value
        elif sample.name == _RUNNING:
            running += sample.value
    if not reported:
        return None
    return figures.use(
        ByKind(**{kind: round(size / figures.block_bytes) for kind, size in used.items()}),
        round(full_cache / figures.full_cache_block_bytes),
        round(running),
    )


def _samples(*names: str) -> Iterable[Sample]:
    """Samples of gauges, of all API processes."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        families = get_prometheus_registry().collect()
    else:
        families = REGISTRY.restricted_registry(names).collect()
    return (sample for family in families if family.name in names for sample in family.samples)


def _reports_use(vllm_config: VllmConfig) -> bool:
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if isinstance(scheduler, type):
        scheduler = f"{scheduler.__module__}.{scheduler.__qualname__}"
    return scheduler == SCHEDULER


def _gauge(name: str, documentation: str, *labels: str) -> Gauge:
    return Gauge(_PREFIX + name, documentation, (*_LABELS, *labels), multiprocess_mode="mostrecent")


def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, documentation, (*_LABELS, *labels))


def _unregister() -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(_PREFIX):
            REGISTRY.unregister(collector)
