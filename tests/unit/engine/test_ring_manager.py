"""The ring manager on vLLM's own KV cache manager, without a model."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from rlkv_vllm.engine.cache.ring_manager import RingManager
from rlkv_vllm.engine.cache.specs import RingSpec
from rlkv_vllm.plugin import register
from tests.support.engines import blocks_in_tables, blocks_in_use

register()
init_none_hash(sha256)

BLOCK = 16
GEOMETRY = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def make_manager(
    *,
    num_blocks: int = 400,
    sink: int = 16,
    window: int = 64,
    retention_interval: int = 128,
    num_rings: int = 1,
    caching: bool = True,
    chunk: int = 512,
    steps_in_flight: int = 1,
) -> KVCacheManager:
    ring = RingSpec(
        **GEOMETRY,
        sliding_window=window,
        sink=sink,
        retention_interval=retention_interval,
        num_groups=1 + num_rings,
        chunk_blocks=chunk // BLOCK,
        steps_in_flight=steps_in_flight,
    )
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**GEOMETRY))]
    groups += [KVCacheGroupSpec([f"ring{i}"], ring) for i in range(num_rings)]
    return KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=8192,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        max_in_flight_tokens=chunk,
        enable_caching=caching,
    )


def make_request(name: str, tokens: list[int]) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=100),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def ring_of(manager: KVCacheManager) -> RingManager:
    ring = manager.coordinator.single_type_managers[1]
    assert isinstance(ring, RingManager)
    return ring


def held(manager: KVCacheManager, request: Request) -> list[int]:
    """Indices of the ring's real blocks."""
    table = ring_of(manager).req_to_blocks[request.request_id]
    return [i for i, block in enumerate(table) if not block.is_null]


class Steps:
    """Drives a manager as the scheduler does."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager

    def start(self, request: Request) -> int:
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        self.hit_blocks = blocks
        return hit

    def assert_counts(self) -> None:
        """What the rings say they hold is what their tables hold."""
        for ring in self.manager.coordinator.single_type_managers[1:]:
            assert isinstance(ring, RingManager)
            assert ring.num_held == blocks_in_tables([ring])
        groups = self.manager.coordinator.single_type_managers
        assert blocks_in_use(self.manager.block_pool) == sum(blocks_in_tables([g]) for g in groups)

    def step(self, request: Request, new: int, hit: int = 0) -> bool:
        self.manager.new_step_starts()
        blocks = self.manager.allocate_slots(
            request,
            new,
            num_new_computed_tokens=hit,
            new_computed_blocks=self.hit_blocks if hit else None,
        )
        self.manager.take_new_block_ids()
        self.assert_counts()
        if blocks is None:
            return False
        request.num_computed_tokens += hit + new
        return True

    def prefill(self, request: Request, chunk: int = 512) -> int:
        hit = self.start(request)
        first = True
        while request.num_computed_tokens < request.num_prompt_tokens:
            done = request.num_computed_tokens + (hit if first else 0)
            assert self.step(
                request, min(chunk, request.num_prompt_tokens - done), hit if first else 0
            )
            first = False
        return hit

    def decode(self, request: Request, tokens: int) -> None:
        for i in range(tokens):
            request.append_output_token_ids(i % 7)
            assert self.step(request, 1)


def test_prefill_is_lean_and_decode_stays_in_the_ring() -> None:
    manager = make_manager(caching=False)
    free = manager.block_pool.get_num_free_blocks()
    request = make_request("a", list(range(1000)))
    steps = Steps(manager)
    steps.prefill(request, chunk=1000)
    # Sink block, and positions 937 .. 999 of the window of the next query.
    assert held(manager, request) == [0, *range(937 // BLOCK, 63)]
    peak = 0
    for _ in range(200):
        steps.decode(request, 1)
        peak = max(peak, len(held(manager, request)))
    assert peak <= 1 + 64 // BLOCK + 1
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("chunk", [48, 100, 512])
def test_no_block_leaks_under_chunked_prefill(chunk: int) -> None:
    manager = make_manager()
    free = manager.block_pool.get_num_free_blocks()
    request = make_request("a", list(range(1000)))
    steps = Steps(manager)
    steps.prefill(request, chunk)
    steps.decode(request, 2)
    in_use = free - manager.block_pool.get_num_free_blocks()
    table = ring_of(manager).req_to_blocks["a"]
    assert in_use == -(-1002 // BLOCK) + len(held(manager, request))
    assert held(manager, request) == [0, *range((1002 - 64) // BLOCK, len(table))]
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks if not block.is_null)


def test_tails_are_held_for_one_schedule_only() -> None:
    manager = make_manager(retention_interval=128)
    request = make_request("a", list(range(1000)))
    manager.new_step_starts()
    assert manager.allocate_slots(request, 1000) is not None
    during = held(manager, request)
    manager.take_new_block_ids()
    after = held(manager, request)
    assert after == [0, *range(58, 63)]
    tails = set(during) - set(after)
    # Four blocks before each multiple of 128 tokens, and the one before the window.
    boundaries = {b for end in range(8, 58, 8) for b in range(end - 4, end)}
    assert tails == boundaries - {0} | {57}


def test_no_tails_when_others_could_need_the_blocks() -> None:
    manager = make_manager(num_blocks=110)
    request = make_request("a", list(range(1000)))
    manager.new_step_starts()
    assert manager.allocate_slots(request, 1000) is not None
    assert held(manager, request) == [0, *range(58, 63)]


@pytest.mark.parametrize("interval", [128, 256])
@pytest.mark.parametrize("num_rings", [1, 3])
def test_a_different_prompt_hits_the_shared_prefix(interval: int, num_rings: int) -> None:
    manager = make_manager(retention_interval=interval, num_rings=num_rings, num_blocks=1000)
    shared = list(range(400))
    first = make_request("a", shared + [7] * 600)
    second = make_request("b", shared + [9] * 300)
    steps = Steps(manager)
    steps.prefill(first, 512)
    hit = steps.start(second)
    assert hit >= 384 - interval
    assert hit == 400 // interval * interval


def test_identical_and_continued_prompts_hit() -> None:
    manager = make_manager()
    steps = Steps(manager)
    tokens = [i * 31 % 499 for i in range(700)]
    first = make_request("a", tokens)
    steps.prefill(first, 512)
    again = make_request("b", tokens)
    assert steps.prefill(again, 512) == 688
    steps.decode(first, 100)
    manager.free(first)
    turn = make_request("c", [*first.all_token_ids, *range(50)])
    assert steps.start(turn) == 800 // BLOCK * BLOCK


def test_a_hit_needs_its_sinks() -> None:
    manager = make_manager(sink=20)
    steps = Steps(manager)
    tokens = list(range(700))
    first = make_request("a", tokens)
    steps.prefill(first)
    ring = ring_of(manager)
    sink_block = ring.req_to_blocks["a"][1]
    manager.free(first)
    manager.block_pool._maybe_evict_cached_block(sink_block)
    assert steps.start(make_request("b", tokens)) == BLOCK


def test_hit_tables_hold_sinks_and_window_only() -> None:
    manager = make_manager()
    steps = Steps(manager)
    tokens = list(range(700))
    steps.prefill(make_request("a", tokens))
    again = make_request("b", tokens)
    assert steps.prefill(again) == 688
    real = held(manager, again)
    assert real[0] == 0
    assert real[1:] == list(range(real[1], 44))
    assert all(b - a == 1 for a, b in pairwise(real[1:]))
    assert real[1] >= (688 - 64) // BLOCK


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_admission_covers_the_peak(steps_in_flight: int) -> None:
    spec = ring_of(make_manager(steps_in_flight=steps_in_flight)).kv_cache_spec
    assert isinstance(spec, RingSpec)
    cap = spec.max_admission_blocks_per_request(512, 8192)
    peaks = []
    for chunk in (48, 100, 512):
        manager = make_manager(caching=False, steps_in_flight=steps_in_flight)
        request = make_request("a", list(range(1000)))
        steps = Steps(manager)
        steps.start(request)
        peak = 0
        while request.num_computed_tokens < 1000:
            manager.new_step_starts()
            new = min(chunk, 1000 - request.num_computed_tokens)
            # The scheduler has counted these tokens, their step is still running.
            request.num_in_flight_tokens = min(
                request.num_computed_tokens, chunk * (steps_in_flight - 1)
            )
            assert manager.allocate_slots(request, new) is not None
            peak = max(peak, len(held(manager, request)))
            manager.take_new_block_ids()
            request.num_computed_tokens += new
        peaks.append(peak)
    assert max(peaks) <= cap
    # Tight: a cap for fewer steps in flight would not do.
    assert max(peaks) > cap - spec.window_blocks


def test_evictions_hits_and_shared_blocks_are_counted() -> None:
    manager = make_manager()
    ring = ring_of(manager)
    steps = Steps(manager)
    first, second = (make_request(name, list(range(1000))) for name in "ab")
    steps.prefill(first, chunk=200)
    assert ring.num_hit == 0
    alone = ring.num_held
    hit = steps.prefill(second)
    assert hit > 0
    assert ring.num_hit == sum(
        not block.is_null for block in steps.hit_blocks.blocks[1][: hit // BLOCK]
    )
    assert alone < ring.num_held < 2 * alone  # the sink at least is shared
    steps.decode(first, 1)  # the window before the last chunk goes
    before = ring.num_evicted
    steps.decode(first, 10 * BLOCK)
    assert ring.num_evicted - before == 10
    manager.free(first)
    steps.assert_counts()
    manager.free(second)
    assert ring.num_held == 0


def test_specs_of_different_groups_do_not_merge() -> None:
    a = RingSpec(**GEOMETRY, sliding_window=64, sink=16, cache_group=1)
    b = RingSpec(**GEOMETRY, sliding_window=64, sink=16, cache_group=2)
    with pytest.raises(AssertionError):
        RingSpec.merge([a, b])
    assert RingSpec.merge([a, a]).cache_group == 0
    assert not a.is_uniform_with_collection({"a": a, "b": b})


def test_an_answer_leaves_only_what_can_be_resumed_at() -> None:
    manager = make_manager(retention_interval=128)
    steps = Steps(manager)
    request = make_request("a", [i * 31 % 499 for i in range(300)])
    steps.prefill(request)
    steps.decode(request, 400)
    manager.free(request)
    cached = sum(
        block.block_hash is not None and block.block_hash[-4:] == (1).to_bytes(4, "big")
        for block in manager.block_pool.blocks
    )
    # Sink, 4 blocks before each of 5 boundaries, 5 before the prompt's end, and the last window.
    assert 5 * 4 < cached <= 1 + 5 * 4 + 5 + 5
    resent = make_request("b", request.all_token_ids[:300])
    assert steps.start(resent) == 288
    turn = make_request("c", [*request.all_token_ids, *range(50)])
    assert steps.start(turn) == 699 // BLOCK * BLOCK
    for boundary in (384, 512, 640):
        branch = make_request(str(boundary), [*request.all_token_ids[: boundary + 20], *range(60)])
        assert steps.start(branch) >= boundary


def test_a_hit_is_admitted_wherever_the_whole_request_would_be() -> None:
    """The pool just holds one long request; a hit must not ask for more than that."""
    spec = ring_of(make_manager()).kv_cache_spec
    assert isinstance(spec, RingSpec)
    blocks = 1600 // BLOCK + spec.max_admission_blocks_per_request(512, 1600)
    manager = make_manager(num_blocks=1 + blocks, retention_interval=256)
    steps = Steps(manager)
    first = make_request("a", list(range(805)))
    steps.prefill(first, 512)
    manager.free(first)
    second = make_request("b", [*range(800), *range(2000, 2790)])
    hit = steps.start(second)
    assert hit >= 768
    manager.new_step_starts()
    admitted = manager.allocate_slots(
        second,
        512,
        num_new_computed_tokens=hit,
        new_computed_blocks=steps.hit_blocks,
        full_sequence_must_fit=True,
    )
    assert admitted is not None
