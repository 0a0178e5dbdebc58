"""The metrics under load, against the engine's block pool counted block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY

from rlkv_vllm.engine.cache.ring_manager import RingManager
from rlkv_vllm.engine.config import split_plan
from rlkv_vllm.serving.metrics import RlkvStatLogger
from rlkv_vllm.serving.status import ByKind, CacheFigures
from tests.integration.conftest import random_prompt
from tests.support.engines import (
    EngineCache,
    blocks_in_tables,
    blocks_in_use,
    greedy,
    pool_is_restored,
    scheduler,
)

if TYPE_CHECKING:
    from vllm import LLM

BLOCK = 16


class Observed(RlkvStatLogger):
    """Knows whether a step was recorded."""

    is_fresh = False

    def record(self, *args: Any, **kwargs: Any) -> None:
        super().record(*args, **kwargs)
        self.is_fresh = True


def value(llm: LLM, name: str, **labels: str) -> float:
    model = llm.llm_engine.vllm_config.model_config.served_model_name
    found = REGISTRY.get_sample_value(f"rlkv:{name}", {"model_name": model, "engine": "0"} | labels)
    assert found is not None
    return found


@pytest.fixture
def llm(
    checkpoint: Callable[[str], Path], profile_of: Callable[..., Path], engines: EngineCache
) -> LLM:
    model = checkpoint("qwen3")
    profile = profile_of(model, [[0, 2], [], [0, 1, 2, 3], [3]], sink=16, window=48)
    return engines.get(
        model,
        profile,
        block_size=BLOCK,
        num_gpu_blocks_override=150,
        enable_prefix_caching=True,
        max_model_len=1024,
        max_num_batched_tokens=200,
        disable_log_stats=False,
    )


@pytest.fixture
def figures(llm: LLM) -> Iterator[tuple[CacheFigures, Observed]]:
    config = llm.llm_engine.vllm_config
    plan = split_plan(config)
    assert plan is not None
    figures = CacheFigures(plan, scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks)
    stat_logger = Observed(config, [0])
    stat_logger.show_split(figures)
    manager = llm.llm_engine.logger_manager
    assert manager is not None
    manager.stat_loggers.insert(0, stat_logger)  # plugins' loggers come first
    yield figures, stat_logger
    manager.stat_loggers.remove(stat_logger)


class Counted:
    """Counts what the metrics count, from outside: in the block tables and at the scheduler."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        self.rings = [manager for manager in managers if isinstance(manager, RingManager)]
        self.full = [manager for manager in managers if manager not in self.rings]
        self.evicted = 0
        self.hits = {"full": 0, "streaming": 0}
        self.preempted: list[str] = []
        for manager in managers:
            kind = "streaming" if manager in self.rings else "full"
            self._wrap(monkeypatch, manager, "add_local_computed_blocks", self._hit(kind))
        for ring in self.rings:
            self._wrap(monkeypatch, ring, "remove_skipped_blocks", self._evict)
        preempt = scheduler(llm)._preempt_request

        def spy(request: Any, *args: Any, **kwargs: Any) -> None:
            self.preempted.append(request.request_id)
            preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler(llm), "_preempt_request", spy)

    @staticmethod
    def _wrap(
        monkeypatch: pytest.MonkeyPatch, manager: Any, name: str, count: Callable[[int, int], None]
    ) -> None:
        method = getattr(manager, name)

        def spy(request_id: str, *args: Any, **kwargs: Any) -> None:
            def real() -> int:
                return sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))

            before = real()
            method(request_id, *args, **kwargs)
            count(before, real())

        monkeypatch.setattr(manager, name, spy)

    def _hit(self, kind: str) -> Callable[[int, int], None]:
        def count(before: int, after: int) -> None:
            self.hits[kind] += after - before

        return count

    def _evict(self, before: int, after: int) -> None:
        self.evicted += before - after


def test_metrics_equal_the_block_pool_under_load(
    llm: LLM, figures: tuple[CacheFigures, Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, stat_logger = figures
    pool = scheduler(llm).kv_cache_manager.block_pool
    counted = Counted(llm, monkeypatch)
    assert counted.rings
    assert counted.full
    core = llm.llm_engine
    shared = random_prompt(300, 1)
    for n in range(24):
        prompt = (shared if n % 2 else []) + random_prompt(20 + 11 * n, 2)
        core.add_request(str(n), {"prompt_token_ids": prompt}, greedy(60 + n))
    checked, most, aborted = 0, 0, set[str]()
    for step in range(3000):
        if not core.has_unfinished_requests():
            break
        core.step()
        if stat_logger.is_fresh:
            stat_logger.is_fresh = False
            use = stat_logger.cache_use()
            assert use is not None
            full, streaming = blocks_in_tables(counted.full), blocks_in_tables(counted.rings)
            assert use.blocks == ByKind(full=full, streaming=streaming)
            assert full + streaming == blocks_in_use(pool)
            assert value(llm, "cache_used_bytes", kind="full") == full * sizes.block_bytes
            assert value(llm, "full_cache_bytes") == full * sizes.full_cache_block_bytes
            assert value(llm, "cache_saved_bytes") == (
                full * sizes.full_cache_block_bytes - blocks_in_use(pool) * sizes.block_bytes
            )
            assert value(llm, "requests_running") == len(scheduler(llm).running)
            assert value(llm, "ring_evictions_total") == counted.evicted
            for kind, hits in counted.hits.items():
                assert value(llm, "prefix_cache_hit_blocks_total", kind=kind) == hits
            checked += 1
            most = max(most, streaming)
        if step in (20, 60, 100):
            aborted.add(str(step // 20))
            core.abort_request([str(step // 20)], internal=False)
    assert pool_is_restored(llm)
    assert checked > 100
    assert most > 20
    assert counted.evicted > 100
    assert min(counted.hits.values()) > 0
    # A preemption is told with the request's next token, which an aborted one never has.
    told = value(llm, "preemptions_total")
    assert told >= sum(name not in aborted for name in counted.preempted) >= 3
    assert told <= len(counted.preempted)
