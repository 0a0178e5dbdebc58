"""Block manager of streaming heads: pinned sinks, a window, and nothing in between.

The block table of a request stays append-only and position-indexed:
``[sink][null] ... [null][window][window]``. Blocks that leave the window go
back to the pool at once.

*Lean prefill*: positions of a chunk that are already out of the window when the
chunk ends get null blocks; attention takes them from the step's inputs. The
peak of a request is then its steady state, whatever the prompt's length.

*Retained tails*: with prefix caching, lean prefill alone would leave nothing for a different prompt
with the same beginning to hit. So every ``retention_interval`` tokens the window's worth of blocks
that ends there is allocated for the one step that fills it, entered into the prefix cache, and
given back as soon as that step is scheduled. A given-back block keeps its content until the pool
reuses it in a later step, so a tail costs no capacity: it is taken only while more blocks are free
than the running requests ask for in a step. At worst a waiting request is admitted one step later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from rlkv_vllm.engine.cache.specs import RingSpec


class RingManager(SlidingWindowManager):
    """Manages the block tables of one group of streaming heads."""

    def __init__(self, kv_cache_spec: RingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.num_sink_blocks = kv_cache_spec.num_sink_blocks
        self.window_blocks = kv_cache_spec.window_blocks
        self.tail_blocks = self.window_blocks - 1
        self.segment_blocks = kv_cache_spec.retention_interval // self.block_size
        self.num_groups = kv_cache_spec.num_groups
        self.chunk_blocks = kv_cache_spec.chunk_blocks
        self.steps_in_flight = kv_cache_spec.steps_in_flight
        # First block index not yet looked at by remove_skipped_blocks.
        self._swept: dict[str, int] = {}
        # Block indices that are given back when the running step is scheduled.
        self._tails: dict[str, list[int]] = {}
        # How many block tables hold a block: one block may be shared by several requests.
        self._holders: Counter[int] = Counter()
        #: Blocks that left the window and were given back, since the engine started.
        self.num_evicted = 0
        #: Blocks taken from the prefix cache, since the engine started.
        self.num_hit = 0

    # ---- figures

    @property
    def num_held(self) -> int:
        """Blocks of the pool that this group's block tables hold, shared ones once."""
        return len(self._holders)

    def _hold(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self._holders[block.block_id] += 1

    def _drop(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if self._holders[block.block_id] == 1:
                del self._holders[block.block_id]
            else:
                self._holders[block.block_id] -= 1

    # ---- allocation

    def _window_start(self, num_tokens: int) -> int:
        """Index of the first block that the query after ``num_tokens`` still sees."""
        return self.get_num_skipped_tokens(num_tokens) // self.block_size

    def _num_real_blocks(self, first_block: int, num_tokens: int) -> int:
        """Blocks to take for positions ``first_block * block_size .. num_tokens``."""
        end = cdiv(num_tokens, self.block_size)
        null_from = max(first_block, self.num_sink_blocks)
        null_to = min(end, self._window_start(num_tokens))
        return max(end - first_block, 0) - max(null_to - null_from, 0)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that ``allocate_new_blocks`` will take, and hits it revives."""
        first = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        if first * self.block_size >= num_tokens and not new_computed_blocks:
            return 0  # most decode steps
        needed = self._num_real_blocks(first, num_tokens)
        kept = self._kept_of_hit(new_computed_blocks, total_computed_tokens)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            # The windows before the chunks in flight are held beside the one at the end.
            held = min(
                needed + self.steps_in_flight * self.window_blocks,
                max(cdiv(num_tokens, self.block_size) - first, 0),
            )
            # The cap is on all that the request holds, a hit's sinks and window included.
            hit = sum(not block.is_null for block in kept)
            needed = min(held, max(self.max_admission_blocks_per_request - hit, 0))
        return needed + self._get_num_evictable_blocks(kept)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Extend the block table to ``num_tokens``; out-of-window positions get null blocks."""
        table = self.req_to_blocks[request_id]
        first = len(table)
        if first * self.block_size >= num_tokens:
            return []
        window_start = self._window_start(num_tokens)
        taken = self.block_pool.get_new_blocks(self._num_real_blocks(first, num_tokens))
        self._hold(taken)
        real = iter(taken)
        new_blocks = [
            next(real) if i < self.num_sink_blocks or i >= window_start else self._null_block
            for i in range(first, cdiv(num_tokens, self.block_size))
        ]
        if self.enable_caching:
            self._add_tails(request_id, new_blocks, first, window_start)
        table.extend(new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(b.block_id for b in new_blocks if not b.is_null)
        return new_blocks

    def _add_tails(
        self, request_id: str, new_blocks: list[KVCacheBlock], first: int, window_start: int
    ) -> None:
        """Give retained positions of a chunk a block for the step that fills them."""
        tails = [
            i
            for i in range(
                max(first, self.num_sink_blocks), min(window_start, first + len(new_blocks))
            )
            if self._is_retained(i) or i == window_start - 1
        ]
        if not tails:
            return
        # What all other requests may still ask for in this step, at the most.
        reserve = self.chunk_blocks + self.num_groups * (
            len(self.req_to_blocks)
            + self.num_sink_blocks
            + (1 + self.steps_in_flight) * self.window_blocks
        )
        if self.block_pool.get_num_free_blocks() - len(tails) < reserve:
            return
        taken = self.block_pool.get_new_blocks(len(tails))
        self._hold(taken)
        for i, block in zip(tails, taken, strict=True):
            new_blocks[i - first] = block
        self._tails[request_id] = tails

    def _is_retained(self, block_index: int) -> bool:
        """Whether a prefix-cache hit at a retention boundary needs this block.

        The end of the prompt is the callers' case: a resent prompt resumes one
        token before it, which may be one block earlier.
        """
        segment = self.segment_blocks
        return segment > 0 and block_index % segment >= segment - self.tail_blocks

    # ---- giving back

    def _release_tails(self) -> None:
        for request_id, tails in self._tails.items():
            table = self.req_to_blocks[request_id]
            freed = [table[i] for i in reversed(tails)]
            for i in tails:
                table[i] = self._null_block
            self._drop(freed)
            self.block_pool.free_blocks(freed)
        self._tails.clear()

    def take_new_block_ids(self) -> list[int]:
        """Drain new block ids; vLLM calls this once all of a step is scheduled.

        Nothing allocates between this call and the next step, so the tails go
        back here: another owner can only write them in a later step, after
        this one has filled them and after any hit has taken a reference.
        """
        self._release_tails()
        return super().take_new_block_ids()

    def new_step_starts(self) -> None:
        """A new step: nothing of the last one may be pending."""
        self._release_tails()
        super().new_step_starts()

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what left the window, except the sinks.

        Scans forward from the last call: lean tables have null holes, at which the base class's
        backward scan would stop and leak what lies before. Only retained blocks stay in the prefix
        cache: a long answer would push out everything else with blocks at which nothing can resume.
        """
        first = self._swept.get(request_id, self.num_sink_blocks)
        skipped = processed_computed_tokens - self.sliding_window + 1
        if skipped < (first + 1) * self.block_size:
            return  # most decode steps
        table = self.req_to_blocks.get(request_id)
        if table is None:
            return
        last = min(self._window_start(processed_computed_tokens), len(table))
        if first >= last:
            return
        freed = [block for block in table[first:last] if not block.is_null]
        if self.enable_caching:
            replay = (num_prompt_tokens or 0) // self.block_size
            self.block_pool.evict_blocks(
                {
                    block.block_id
                    for i, block in enumerate(table[first:last], start=first)
                    if not block.is_null
                    and block.ref_cnt == 1
                    and not self._is_retained(i)
                    and not replay - self.tail_blocks - 1 <= i < replay
                }
            )
        table[first:last] = [self._null_block] * (last - first)
        self._swept[request_id] = last
        self.num_evicted += len(freed)
        self._drop(freed)
        self.block_pool.free_blocks(reversed(freed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, its bookkeeping forgotten."""
        self._swept.pop(request_id, None)
        self._tails.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        self._drop(block for block in blocks if not block.is_null)
        return blocks

    # ---- prefix cache

    def _kept_of_hit(
        self, hit: Sequence[KVCacheBlock], num_computed_tokens: int
    ) -> list[KVCacheBlock]:
        """The hit's table: sinks and window, null blocks between."""
        window_start = min(self._window_start(num_computed_tokens), len(hit))
        sinks = list(hit[: self.num_sink_blocks])
        nulls = [self._null_block] * max(window_start - len(sinks), 0)
        return sinks + nulls + list(hit[max(window_start, len(sinks)) :])

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Start a request's table with its prefix-cache hit."""
        assert num_external_computed_tokens == 0, "KV connectors are refused at start-up"
        table = self.req_to_blocks[request_id]
        assert not table
        kept = self._kept_of_hit(new_computed_blocks, num_local_computed_tokens)
        hit = [block for block in kept if not block.is_null]
        self.num_hit += len(hit)
        self._hold(hit)
        self.block_pool.touch(hit)
        table.extend(kept)
        self.num_cached_block[request_id] = len(table)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest prefix whose sinks and last window are cached."""
        assert isinstance(kv_cache_spec, RingSpec)
        block_size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        # A hit may go past the sinks only if all of them are cached.
        sinks: list[list[KVCacheBlock]] = []
        for i in range(min(kv_cache_spec.num_sink_blocks, max_length // block_size)):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                max_length = i * block_size
                break
            sinks.append(cached)
        blocks, hit_length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )
        # The window search returns null blocks before the window: put the sinks in.
        for i, cached in enumerate(sinks[: hit_length // block_size]):
            for table, block in zip(blocks, cached, strict=True):
                table[i] = block
        return blocks, hit_length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> None:
        """Enter every real block into the prefix cache; what is not worth keeping leaves
        it again in :meth:`remove_skipped_blocks`, so that the end of an answer stays.
        """
