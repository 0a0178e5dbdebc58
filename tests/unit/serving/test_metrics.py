"""The stat logger: what a step's statistics become in the Prometheus registry."""

from __future__ import annotations

import sys
import time
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from rlkv_vllm.engine.cache.scheduler import BlockUse, SplitScheduler
from rlkv_vllm.engine.compat import attach_figures
from rlkv_vllm.serving.metrics import RlkvStatLogger
from rlkv_vllm.serving.status import ByKind, CacheFigures
from tests.support.plans import BLOCKS, make_plan, vllm_config

USE = BlockUse(full=30, streaming=4, full_cache=30, evicted=3, full_hit=5, streaming_hit=2)


def value(name: str, engine: int = 0, **labels: str) -> float | None:
    everywhere = {"model_name": "m", "engine": str(engine)}
    return REGISTRY.get_sample_value(f"rlkv:{name}", everywhere | labels)


def stats(use: BlockUse | None, running: int = 2) -> SchedulerStats:
    """Statistics as they reach the front end."""
    sent = SchedulerStats(num_running_reqs=running)
    if use is not None:
        attach_figures(sent, use._asdict())
    wire = msgspec.msgpack.encode(EngineCoreOutputs(scheduler_stats=sent))
    received = msgspec.msgpack.decode(wire, type=EngineCoreOutputs).scheduler_stats
    assert received is not None
    return received


def preempted(count: int) -> Any:
    return SimpleNamespace(num_preempted_reqs=count)


@pytest.fixture
def figures() -> CacheFigures:
    return CacheFigures(make_plan(), BLOCKS)


def test_block_use_survives_the_way_between_the_processes() -> None:
    received = stats(USE)
    assert BlockUse.taken_from(received) == USE
    assert received == SchedulerStats(num_running_reqs=2)  # what vLLM's own loggers then see
    assert BlockUse.taken_from(received) is None


def test_without_a_split_only_active_is_exported() -> None:
    stat_logger = RlkvStatLogger(vllm_config(), [0])
    stat_logger.record(stats(None), preempted(3))
    assert value("active") == 0
    ours = [line for line in generate_latest().decode().splitlines() if line.startswith("rlkv:")]
    assert len(ours) == 1


def test_a_proven_split_exports_everything_before_the_first_step(figures: CacheFigures) -> None:
    RlkvStatLogger(vllm_config(), [0]).show_split(figures)
    assert value("active") == 1
    assert value("heads", kind="full") == value("heads", kind="streaming") == 4
    assert value("cache_capacity_bytes") == figures.capacity_bytes
    possible = figures.requests_possible(512)
    assert value("requests_possible", cache="split") == possible.split
    assert value("requests_possible", cache="full") == possible.full
    for name in ("cache_saved_bytes", "full_cache_bytes", "requests_running"):
        assert value(name) == 0
    for name in ("ring_evictions_total", "preemptions_total"):
        assert value(name) == 0
    for kind in ("full", "streaming"):
        assert value("cache_used_bytes", kind=kind) == 0
        assert value("prefix_cache_hit_blocks_total", kind=kind) == 0


def test_gauges_follow_and_counters_add_up(figures: CacheFigures) -> None:
    stat_logger = RlkvStatLogger(vllm_config(), [0])
    stat_logger.show_split(figures)
    stat_logger.record(stats(USE), preempted(1))
    stat_logger.record(stats(USE, running=5), preempted(2))
    stat_logger.record(None, preempted(0))
    assert value("cache_used_bytes", kind="full") == 30 * figures.block_bytes
    assert value("cache_used_bytes", kind="streaming") == 4 * figures.block_bytes
    assert value("full_cache_bytes") == 30 * figures.full_cache_block_bytes
    assert value("cache_saved_bytes") == (
        30 * figures.full_cache_block_bytes - 34 * figures.block_bytes
    )
    assert value("requests_running") == 5
    assert value("ring_evictions_total") == 6
    assert value("preemptions_total") == 3
    assert value("prefix_cache_hit_blocks_total", kind="full") == 10
    assert value("prefix_cache_hit_blocks_total", kind="streaming") == 4


def test_statistics_without_counts_leave_the_gauges(figures: CacheFigures) -> None:
    stat_logger = RlkvStatLogger(vllm_config(), [0])
    stat_logger.show_split(figures)
    stat_logger.record(stats(USE), None)
    stat_logger.record(stats(None), None)
    assert value("cache_used_bytes", kind="full") == 30 * figures.block_bytes


def test_engines_have_series_of_their_own_and_the_endpoint_adds_them_up(
    figures: CacheFigures,
) -> None:
    stat_logger = RlkvStatLogger(vllm_config(), [0, 1])
    stat_logger.show_split(figures)
    stat_logger.record(stats(USE), None, engine_idx=0)
    stat_logger.record(stats(USE, running=1), None, engine_idx=1)
    assert value("requests_running", engine=0) == 2
    assert value("requests_running", engine=1) == 1
    use = stat_logger.cache_use()
    assert use is not None
    assert use.blocks == ByKind(full=60, streaming=8)
    assert use.full_cache_bytes == 60 * figures.full_cache_block_bytes
    assert use.requests_running == 3


class Derived(SplitScheduler):
    """A user's own, made from ours."""


@pytest.mark.parametrize("scheduler", [SplitScheduler, Derived, Scheduler])
def test_use_is_shown_only_where_our_scheduler_reports_it(
    figures: CacheFigures, scheduler: type
) -> None:
    stat_logger = RlkvStatLogger(vllm_config(scheduler), [0])
    stat_logger.show_split(figures)
    reports = scheduler is not Scheduler
    assert (stat_logger.cache_use() is not None) == reports
    assert (value("cache_used_bytes", kind="full") == 0) == reports


def test_a_scrape_tells_of_one_step(figures: CacheFigures) -> None:
    """While one thread records steps, every scrape of another adds up."""
    stat_logger = RlkvStatLogger(vllm_config(), [0])
    stat_logger.show_split(figures)
    done = Event()

    def record() -> None:
        step = 0
        while not done.is_set():
            step += 1
            use = USE._replace(full=step, streaming=2 * step, full_cache=3 * step)
            stat_logger.record(stats(use, running=step), None)

    recording = Thread(target=record)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    recording.start()
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while len(seen) < 20:
            assert recording.is_alive()
            assert time.monotonic() < deadline
            seen.add(now(stat_logger, figures))
    finally:
        done.set()
        recording.join()
        sys.setswitchinterval(interval)


def now(stat_logger: RlkvStatLogger, figures: CacheFigures) -> int:
    """The step of which all metrics tell."""
    told = {
        (sample.name.removeprefix("rlkv:"), sample.labels.get("kind")): sample.value
        for metric in stat_logger.collect()
        for sample in metric.samples
    }
    step = int(told["requests_running", None])
    full, streaming = (told["cache_used_bytes", kind] for kind in ("full", "streaming"))
    assert (full, streaming) == (step * figures.block_bytes, 2 * step * figures.block_bytes)
    assert told["full_cache_bytes", None] == 3 * step * figures.full_cache_block_bytes
    assert told["cache_saved_bytes", None] == told["full_cache_bytes", None] - full - streaming
    assert told["ring_evictions_total", None] == USE.evicted * step
    return step


def test_another_engine_in_the_process_starts_anew(figures: CacheFigures) -> None:
    first = RlkvStatLogger(vllm_config(), [0])
    first.show_split(figures)
    first.record(stats(USE), preempted(1))
    RlkvStatLogger(vllm_config(), [0])
    assert value("active") == 0
    assert value("preemptions_total") is None


def test_vllm_accepts_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    monkeypatch.setenv("VLLM_PLUGINS", "rlkv")
    assert load_stat_logger_plugin_factories() == [RlkvStatLogger]
