"""vLLM's scheduler that also reports how many blocks each kind of head holds.

vLLM's own statistics know one pool. Only the scheduler's process sees the block
managers, so the counts leave it with the statistics of each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rlkv_vllm.engine.cache.ring_manager import RingManager
from rlkv_vllm.engine.compat import attach_figures, detach_figures

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats


class BlockUse(NamedTuple):
    """Blocks of one engine after a step; what is shared by several requests counts once."""

    full: int  # held by full heads
    streaming: int  # held by streaming heads
    full_cache: int  # what the same requests would hold in a cache without streaming heads
    evicted: int  # of streaming heads, given back in this step because they left the window
    full_hit: int  # of full heads, taken from the prefix cache in this step
    streaming_hit: int  # the same of streaming heads

    @classmethod
    def taken_from(cls, stats: SchedulerStats) -> Self | None:
        """Take the counts out of a step's statistics; None if there are none."""
        figures = detach_figures(stats)
        return cls(**figures) if figures else None


class SplitScheduler(Scheduler):
    """Adds :class:`BlockUse` to the statistics of every step.

    vLLM itself chooses `AsyncScheduler` where scheduling is asynchronous, but uses a given class as
    it is. A plain `Scheduler` there schedules nothing in every second step, because it does not
    count the tokens that are still to come. So this class chooses as vLLM does.
    """

    def __new__(cls, vllm_config: VllmConfig, *_: Any, **__: Any) -> Self:
        """An instance of `AsyncSplitScheduler` where scheduling is asynchronous."""
        if vllm_config.scheduler_config.async_scheduling and cls is SplitScheduler:
            return super().__new__(AsyncSplitScheduler)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._rings = [manager for manager in managers if isinstance(manager, RingManager)]
        self._has_full_group = len(self._rings) < len(managers)
        self._evicted = self._hit = 0

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """The statistics of a step."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            attach_figures(stats, self._block_use(stats)._asdict())
        return stats

    def _block_use(self, stats: SchedulerStats) -> BlockUse:
        pool = self.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # 1: the null block
        streaming = sum(ring.num_held for ring in self._rings)
        full = full_cache = used - streaming
        if not self._has_full_group:
            # Ring tables are indexed by position, so their length is that of a full table.
            full_cache = sum(map(len, self._rings[0].req_to_blocks.values()))
        evicted = sum(ring.num_evicted for ring in self._rings)
        hit = sum(ring.num_hit for ring in self._rings)
        prefix = stats.prefix_cache_stats
        full_hit = (prefix.hits + prefix.preempted_hits) // self.block_size
        use = BlockUse(
            full=full,
            streaming=streaming,
            full_cache=full_cache,
            evicted=evicted - self._evicted,
            full_hit=full_hit if self._has_full_group else 0,
            streaming_hit=hit - self._hit,
        )
        self._evicted, self._hit = evicted, hit
        return use


class AsyncSplitScheduler(SplitScheduler, AsyncScheduler):
    """`SplitScheduler` for asynchronous scheduling: two steps in flight."""
