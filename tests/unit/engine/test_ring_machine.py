"""vLLM's scheduler over split caches against a model of what lies in every cache slot.

Random requests, steps, aborts, resets and evictions go through the real scheduler, block pool
and managers. In place of a worker stands :class:`Worker`: it keeps the block tables that the
scheduler sent, writes into every slot which token of which history it holds, and reads what
attention would read. A wrong, missing or overwritten block is a slot with another content.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import Qwen3Config
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rlkv_vllm.engine.cache.ring_manager import RingManager
from rlkv_vllm.engine.cache.specs import RingSpec
from tests.unit.engine.test_ring_manager import GEOMETRY  # registers the ring manager

BLOCK = GEOMETRY["block_size"]
MAX_LEN, MAX_REQUESTS = 384, 5


@dataclass(frozen=True)
class Setting:
    """A pool and its rings; ``blocks`` beyond what the longest request needs."""

    sink: int
    window: int
    retention: int
    rings: int
    chunk: int
    spare_blocks: int
    caching: bool
    in_flight: int


SETTINGS = (
    Setting(16, 64, 128, 1, 100, 12, True, 2),
    Setting(20, 33, 64, 2, 48, 30, True, 2),
    Setting(0, 64, 0, 1, 200, 300, True, 2),
    Setting(16, 64, 128, 3, 100, 12, True, 1),
    Setting(33, 17, 256, 1, 64, 40, True, 1),
    Setting(16, 48, 128, 2, 80, 6, False, 2),
)


@lru_cache(maxsize=1)
def base_config() -> VllmConfig:
    with TemporaryDirectory() as folder:
        Qwen3Config(
            num_hidden_layers=1,
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=512,
            architectures=["Qwen3ForCausalLM"],
        ).save_pretrained(folder)
        return EngineArgs(
            model=folder, skip_tokenizer_init=True, max_model_len=MAX_LEN, block_size=BLOCK
        ).create_engine_config()


def make_scheduler(setting: Setting) -> Scheduler:
    base = base_config()
    ring = RingSpec(
        **GEOMETRY,
        sliding_window=setting.window,
        sink=setting.sink,
        retention_interval=setting.retention,
        num_groups=1 + setting.rings,
        chunk_blocks=-(-setting.chunk * setting.in_flight // BLOCK),
        steps_in_flight=setting.in_flight,
    )
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**GEOMETRY))]
    groups += [KVCacheGroupSpec([f"ring{i}"], ring) for i in range(setting.rings)]
    longest = MAX_LEN // BLOCK + setting.rings * ring.max_admission_blocks_per_request(0, MAX_LEN)
    num_blocks = 1 + longest + setting.spare_blocks
    # Copies and not `replace`: vLLM's checks would run again for every example.
    config = copy(base)
    config.scheduler_config = copy(base.scheduler_config)
    config.scheduler_config.max_num_batched_tokens = setting.chunk
    config.scheduler_config.max_num_scheduled_tokens = setting.chunk
    config.scheduler_config.max_num_seqs = MAX_REQUESTS
    config.scheduler_config.async_scheduling = setting.in_flight > 1
    config.cache_config = copy(base.cache_config)
    config.cache_config.num_gpu_blocks = num_blocks
    config.cache_config.enable_prefix_caching = setting.caching
    assert config.max_concurrent_batches == setting.in_flight
    return (AsyncScheduler if setting.in_flight > 1 else Scheduler)(
        config,
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        StructuredOutputManager(config),
        block_size=BLOCK,
    )


class History:
    """A request's tokens. What the model would sample follows from what stands before it."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens: list[int] = []
        self.prefixes: list[int] = []
        for token in prompt:
            self._append(token)

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(hash((self.prefixes[-1] if self.prefixes else 0, token)))

    def token(self, position: int) -> int:
        while len(self.tokens) <= position:
            # Two values only: requests with the same prompt go the same way.
            self._append(self.prefixes[-1] % 2)
        return self.tokens[position]

    def prefix(self, position: int) -> int:
        """What the key at ``position`` depends on: all tokens up to it."""
        self.token(position)
        return self.prefixes[position]


@dataclass
class Chunk:
    """One request in one step."""

    name: str
    start: int
    end: int
    tables: list[list[int]]
    samples: bool


class Worker:
    """Block tables as sent, and per group and slot the history that was written there."""

    def __init__(self, setting: Setting, num_groups: int) -> None:
        self.setting = setting
        self.histories: dict[str, History] = {}
        self.tables: dict[str, list[list[int]]] = {}
        self.slots: dict[tuple[int, int], int] = {}
        self.num_groups = num_groups

    def receive(self, output: SchedulerOutput, scheduler: Scheduler) -> list[Chunk]:
        for name in output.finished_req_ids:
            self.tables.pop(name, None)
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, ids, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            starts[name] = start
            if name in cached.resumed_req_ids:
                assert ids is not None
                self.tables[name] = [list(group) for group in ids]
            elif ids is not None:
                for table, group in zip(self.tables[name], ids, strict=True):
                    table.extend(group)
        return [
            Chunk(
                name,
                starts[name],
                starts[name] + count,
                [list(table) for table in self.tables[name]],
                not scheduler.requests[name].is_prefill_chunk,
            )
            for name, count in output.num_scheduled_tokens.items()
        ]

    def run(self, chunks: list[Chunk]) -> ModelRunnerOutput:
        """All caches are written before any is read, as in the attention backend."""
        written: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            history = self.histories[chunk.name]
            for group, table in enumerate(chunk.tables):
                for position in range(chunk.start, chunk.end):
                    block = table[position // BLOCK]
                    if block:
                        key = (block, position % BLOCK)
                        content = hash((group, history.prefix(position)))
                        assert written.setdefault(key, content) == content, (
                            f"two owners of block {block} in one step"
                        )
        self.slots |= written
        for chunk in chunks:
            self._read(chunk)
        return ModelRunnerOutput(
            req_ids=[chunk.name for chunk in chunks],
            req_id_to_index={chunk.name: i for i, chunk in enumerate(chunks)},
            sampled_token_ids=[
                [self.histories[chunk.name].token(chunk.end)] if chunk.samples else []
                for chunk in chunks
            ],
        )

    def _read(self, chunk: Chunk) -> None:
        history = self.histories[chunk.name]
        sink, window = self.setting.sink, self.setting.window
        for group, table in enumerate(chunk.tables):
            if group == 0:  # every key; one of each whole block is enough
                whole = chunk.end // BLOCK * BLOCK
                seen = itertools.chain(range(0, whole, BLOCK), range(whole, chunk.end))
            else:  # keys of the chunk itself come from the step's inputs
                in_window = range(max(chunk.start - window + 1, 0), chunk.start)
                seen = itertools.chain(range(min(sink, chunk.start)), in_window)
            for position in seen:
                found = self.slots.get((table[position // BLOCK], position % BLOCK))
                assert found == hash((group, history.prefix(position))), (
                    f"{chunk.name} at {chunk.start}..{chunk.end} reads position {position} "
                    f"of group {group} from block {table[position // BLOCK]}: wrong content"
                )


class RingMachine(RuleBasedStateMachine):
    setting: Setting

    @initialize()
    def start(self) -> None:
        self.scheduler = make_scheduler(self.setting)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.rings = self.manager.coordinator.single_type_managers[1:]
        assert all(isinstance(ring, RingManager) for ring in self.rings)
        self.worker = Worker(self.setting, 1 + len(self.rings))
        self.flying: deque[tuple[SchedulerOutput, list[Chunk]]] = deque()
        self.promised: dict[Any, list[int]] = {}
        self.requests: dict[str, tuple[Request, int]] = {}
        self.names = itertools.count()
        self.finished: dict[str, list[int]] = {}

    # ---- what users and the engine do

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 220),
        own=st.integers(1, 100),
        seed=st.integers(0, 1),
        max_tokens=st.integers(1, 50),
    )
    def request(self, family: int, shared: int, own: int, seed: int, max_tokens: int) -> None:
        if len(self.scheduler.requests) >= 2 * MAX_REQUESTS:
            return
        name = str(next(self.names))
        prompt = [random.Random(family).randrange(2, 512) for _ in range(shared)]
        rng = random.Random(f"{family}-{shared}-{seed}")
        prompt += [rng.randrange(2, 512) for _ in range(own)]
        self._add(name, prompt, max_tokens)

    @precondition(lambda self: self.finished)
    @rule(which=st.integers(0, 99), more=st.integers(1, 60), max_tokens=st.integers(1, 40))
    def next_turn(self, which: int, more: int, max_tokens: int) -> None:
        """A finished conversation goes on."""
        before = list(self.finished.values())[which % len(self.finished)]
        if len(before) + more + max_tokens < MAX_LEN:
            self._add(str(next(self.names)), [*before, *range(2, 2 + more)], max_tokens)

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        max_tokens = min(max_tokens, MAX_LEN - len(prompt) - 1)
        self.worker.histories[name] = History(prompt)
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256) if self.setting.caching else None,
        )
        self.requests[name] = request, 0
        self.scheduler.add_request(request)

    @precondition(lambda self: len(self.flying) < self.setting.in_flight)
    @rule()
    def schedule(self) -> None:
        output = self.scheduler.schedule()
        chunks = self.worker.receive(output, self.scheduler)
        if chunks:
            self.flying.append((output, chunks))
        self._check_tables()

    @precondition(lambda self: self.flying)
    @rule()
    def complete(self) -> None:
        output, chunks = self.flying.popleft()
        results = self.scheduler.update_from_output(output, self.worker.run(chunks))
        for result in results[0].outputs if results else ():
            if result.finish_reason is not None:
                self._check_answer(result.request_id)

    @rule(steps=st.integers(1, 20))
    def run(self, steps: int) -> None:
        """As the engine does: keep as many steps in flight as are allowed."""
        for _ in range(steps):
            before = len(self.flying)
            if before < self.setting.in_flight:
                self.schedule()
            if self.flying and len(self.flying) in (before, self.setting.in_flight):
                self.complete()

    @precondition(lambda self: self.scheduler.requests)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        names = list(self.scheduler.requests)
        name = names[which % len(names)]
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        assert all(
            name not in m.req_to_blocks for m in (self.manager.coordinator.single_type_managers)
        )

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.scheduler._preempt_request(self.scheduler.running.pop(), 0.0)
        self.scheduler.prev_step_scheduled_req_ids.clear()

    @rule(running_too=st.booleans())
    def reset_prefix_cache(self, running_too: bool) -> None:
        idle = not self.scheduler.running
        done = self.scheduler.reset_prefix_cache(reset_running_requests=running_too)
        assert done or not (idle or running_too)

    @precondition(lambda self: self.setting.caching)
    @rule(which=st.integers(0, 10_000), count=st.integers(1, 20))
    def evict(self, which: int, count: int) -> None:
        """Another tenant's blocks push these out of the prefix cache."""
        ids = {1 + (which + i) % (self.pool.num_gpu_blocks - 1) for i in range(count)}
        self.pool.evict_blocks({i for i in ids if self.pool.blocks[i].ref_cnt == 0})

    # ---- what must hold

    def _check_answer(self, name: str) -> None:
        request, _ = self.requests[name]
        answer = list(request.all_token_ids)
        assert len(answer) == request.num_prompt_tokens + request.max_tokens
        history = self.worker.histories[name]
        assert [history.token(i) for i in range(len(answer))] == answer
        self.finished[name] = answer

    def _check_tables(self) -> None:
        """After each schedule: sinks, windows and no more than was admitted."""
        for request in self.scheduler.running:
            done = max(request.num_computed_tokens - request.num_in_flight_tokens, 0)
            for ring in self.rings:
                table = ring.req_to_blocks[request.request_id]
                real = {i for i, block in enumerate(table) if not block.is_null}
                assert set(range(min(ring.num_sink_blocks, len(table)))) <= real
                now = request.num_computed_tokens
                assert set(range(ring._window_start(now), -(-now // BLOCK))) <= real
                cap = ring.max_admission_blocks_per_request
                assert cap is not None
                assert len(real) <= cap, f"{len(real)} blocks held after {done}, cap {cap}"
                assert not ring._tails

    @invariant()
    def blocks_have_one_owner_and_the_free_count_is_exact(self) -> None:
        if not hasattr(self, "pool"):
            return
        references: Counter[int] = Counter()
        place: dict[int, tuple[int, int]] = {}
        for group, manager in enumerate(self.manager.coordinator.single_type_managers):
            assert set(manager.req_to_blocks) <= set(self.scheduler.requests)
            for table in manager.req_to_blocks.values():
                for index, block in enumerate(table):
                    if not block.is_null:
                        references[block.block_id] += 1
                        assert place.setdefault(block.block_id, (group, index)) == (group, index)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == references[block.block_id]
        free = self.pool.num_gpu_blocks - 1 - len(references)
        assert self.pool.get_num_free_blocks() == free
        listed = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert not listed & set(references)
        assert len(listed) == free

    @invariant()
    def the_prefix_cache_holds_what_it_promises(self) -> None:
        if not hasattr(self, "pool") or not self.setting.caching:
            return
        for name, (request, noted) in self.requests.items():
            prefixes = self.worker.histories[name].prefixes
            for i in range(noted, len(request.block_hashes)):
                self.promised[request.block_hashes[i]] = prefixes[i * BLOCK : (i + 1) * BLOCK]
            self.requests[name] = request, len(request.block_hashes)
        if self.flying:
            return  # steps that will write them are still running
        for block in self.pool.blocks[1:]:
            if block.block_hash is None:
                continue
            group = get_group_id(block.block_hash)
            expected = self.promised[get_block_hash(block.block_hash)]
            for slot, prefix in enumerate(expected):
                assert self.worker.slots.get((block.block_id, slot)) == hash((group, prefix))

    def teardown(self) -> None:
        """Everything ends, and the pool is as it was."""
        if not hasattr(self, "pool"):
            return
        for _ in range(5000):
            if not self.scheduler.requests and not self.flying:
                break
            self.run(1)
        assert not self.scheduler.requests, "requests starve"
        self.scheduler.schedule()
        self.blocks_have_one_owner_and_the_free_count_is_exact()
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        for ring in self.rings:
            assert not ring.req_to_blocks
            assert not ring._swept
            assert not ring._tails
            assert not ring.num_cached_block


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_sequence_of_events_breaks_the_rings(setting: Setting) -> None:
    machine = type("Machine", (RingMachine,), {"setting": setting})
    # Without `explain`: it traces every line, and a failure would take minutes to report.
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=10, stateful_step_count=20, phases=[Phase.generate]),
    )
