"""KV cache spec of one streaming head: its ring of pinned sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from rlkv_vllm.allocation import ring


@dataclass(frozen=True, kw_only=True)
class RingSpec(SlidingWindowSpec):
    """One KV head that keeps the first ``sink`` and the last ``sliding_window`` tokens.

    A subclass of ``SlidingWindowSpec`` because vLLM passes the admission cap only to those.

    Attributes:
        cache_group: which streaming heads share a block table. It exists only
            while vLLM sorts specs into groups: :meth:`merge` refuses to mix two
            values, so each becomes a KV cache group of its own, and erases it
            in the group's spec, so that the coordinator sees one kind of ring.
        retention_interval: keep a window's worth of prompt blocks for the prefix cache every so
            many tokens (a multiple of the block size); 0 keeps none.
    """

    sink: int  # first tokens, never freed
    cache_group: int = 0
    retention_interval: int = 0
    num_groups: int = 1  # KV cache groups of the model, full one included
    chunk_blocks: int = 0  # most blocks of one group that the steps in flight can ask for
    steps_in_flight: int = 1  # whose results are not known yet: 2 with asynchronous scheduling

    @property
    def num_sink_blocks(self) -> int:
        """Blocks that hold sinks."""
        return ring.num_blocks(self.sink, self.block_size)

    @property
    def window_blocks(self) -> int:
        """Most blocks that a window touches."""
        return ring.window_blocks(self.sliding_window, self.block_size)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        # Blocks are freed when a step's results are known, so each further step in flight holds
        # one more window.
        windows = 1 + self.steps_in_flight
        return ring.ring_blocks(
            max_model_len, self.sink, self.sliding_window, self.block_size, num_windows=windows
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, RingSpec)
            and (spec.sliding_window, spec.sink, spec.cache_group)
            == (self.sliding_window, self.sink, self.cache_group)
            for spec in kv_cache_specs.values()
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the cache layers of a group."""
        if not all(spec == specs[0] for spec in specs[1:]):
            raise AssertionError("streaming heads of different cache groups do not merge")
        return replace(specs[0], cache_group=0)
