"""The split cache stays exact under everything the scheduler does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from rlkv_vllm.engine.cache.scheduler import BlockUse, SplitScheduler
from tests.integration.conftest import random_prompt
from tests.integration.test_parity import ALL_STREAMING, PROMPT_LENGTHS, UNEVEN
from tests.support.engines import (
    EngineCache,
    counted_steps,
    generate,
    greedy,
    pool_is_restored,
    preemptions,
    scheduler,
)
from tests.support.oracle import count_differences, logprobs

SINK, WINDOW, BLOCK = 16, 64, 16
RETENTION = 256


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def profile(model: Path, profile_of: Callable[..., Path]) -> Path:
    return profile_of(model, UNEVEN, sink=SINK, window=WINDOW)


def assert_exact(model: Path, prompts: list[list[int]], outputs: list[Any]) -> None:
    wrong, worst = zip(
        *(
            count_differences(model, p, o.outputs[0], UNEVEN, SINK, WINDOW)
            for p, o in zip(prompts, outputs, strict=True)
        ),
        strict=True,
    )
    assert sum(wrong) == 0, f"tokens that differ, by request: {wrong}"
    assert max(worst) < 1e-4


@pytest.mark.parametrize("chunk", [48, 100])
def test_chunked_prefill(chunk: int, model: Path, profile: Path, engines: EngineCache) -> None:
    llm = engines.get(
        model, profile, block_size=BLOCK, max_num_batched_tokens=chunk, enable_chunked_prefill=True
    )
    prompts = [random_prompt(n, 2) for n in PROMPT_LENGTHS]
    assert_exact(model, prompts, generate(llm, prompts))
    assert pool_is_restored(llm)


def test_a_seed_survives_a_chunked_prompt(model: Path, profile: Path, engines: EngineCache) -> None:
    """Sampled from the oracle's logits by vLLM's sampler, with the first numbers of the seed."""
    llm = engines.get(
        model, profile, block_size=BLOCK, max_num_batched_tokens=100, enable_chunked_prefill=True
    )
    # Chunks of their own, and of what the others leave of a step.
    prompts = [random_prompt(n, 2) for n in (700, 17, 200)]
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [SamplingParams(seed=n, max_tokens=40, detokenize=False) for n in range(3)]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    for seed, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        tokens = list(output.outputs[0].token_ids)
        rows = logprobs(model, [*prompt, *tokens[:-1]], UNEVEN, SINK, WINDOW)[len(prompt) - 1 :]
        generator = torch.Generator().manual_seed(seed)
        numbers = [torch.randint(0, 2**31, (1,), generator=generator) for _ in tokens]
        expected = torch.ops._C.fused_gumbel_argmax(rows.contiguous(), torch.cat(numbers))
        assert tokens == expected.tolist()
    assert pool_is_restored(llm)


class TestPrefixCaching:
    """Hits restore sinks and windows, and the answers stay exact."""

    @pytest.fixture
    def llm(self, model: Path, profile: Path, engines: EngineCache) -> LLM:
        llm = engines.get(model, profile, block_size=BLOCK, enable_prefix_caching=True)
        assert llm.reset_prefix_cache()
        return llm

    def test_identical_prompt(self, model: Path, llm: LLM) -> None:
        prompt = random_prompt(700, 3)
        first, again = generate(llm, [prompt]), generate(llm, [prompt])
        assert first[0].num_cached_tokens == 0
        assert again[0].num_cached_tokens == 699 // BLOCK * BLOCK
        assert_exact(model, [prompt, prompt], first + again)

    def test_different_prompt_with_a_shared_prefix(self, model: Path, llm: LLM) -> None:
        shared = random_prompt(400, 4)
        prompts = [shared + random_prompt(n, 5) for n in (600, 300, 90)]
        outputs = [generate(llm, [p])[0] for p in prompts]
        for output in outputs[1:]:
            assert (output.num_cached_tokens or 0) >= 384 - RETENTION
        assert outputs[1].num_cached_tokens == RETENTION
        assert_exact(model, prompts, outputs)

    def test_multi_turn(self, model: Path, llm: LLM) -> None:
        prompt = random_prompt(150, 6)
        for turn in range(3):
            output = generate(llm, [prompt])[0]
            # All of the last turn is cached but its last, never computed, token.
            expected = 0 if turn == 0 else (len(prompt) - 31) // BLOCK * BLOCK
            assert output.num_cached_tokens == expected
            assert_exact(model, [prompt], [output])
            prompt = prompt + list(output.outputs[0].token_ids) + random_prompt(30, turn)

    def test_blocks_filled_and_hit_in_one_step(self, model: Path, llm: LLM) -> None:
        shared = random_prompt(512, 7)
        prompts = [shared + random_prompt(40, n) for n in range(6)]
        outputs = generate(llm, prompts)
        assert any(output.num_cached_tokens for output in outputs[1:])
        assert_exact(model, prompts, outputs)
        assert pool_is_restored(llm)


@pytest.mark.parametrize(
    ("caching", "policy"), [(False, "fcfs"), (True, "fcfs"), (True, "priority")]
)
def test_preemption_in_a_small_pool(
    caching: bool, policy: str, model: Path, profile: Path, engines: EngineCache
) -> None:
    llm = engines.get(
        model,
        profile,
        block_size=BLOCK,
        num_gpu_blocks_override=150,
        enable_prefix_caching=caching,
        max_model_len=1024,
        scheduling_policy=policy,
    )
    prompts = [random_prompt(40 + 13 * n, 8) for n in range(30)]
    # The last come first, and the longest: by order of arrival they would be driven out.
    urgency = [-(n // 27) for n in range(30)] if policy == "priority" else None
    with preemptions(llm) as preempted:
        outputs = generate(llm, prompts, 150, priority=urgency)
    assert len(preempted) >= 3, "the pool was large enough: nothing was tested"
    assert {request.priority for request in preempted} == {0}
    assert_exact(model, prompts, outputs)
    assert pool_is_restored(llm)


@pytest.mark.parametrize("caching", [False, True])
def test_aborts_in_flight_give_all_blocks_back(
    caching: bool, model: Path, profile: Path, engines: EngineCache
) -> None:
    llm = engines.get(
        model,
        profile,
        block_size=BLOCK,
        num_gpu_blocks_override=150,
        enable_prefix_caching=caching,
        max_model_len=1024,
        max_num_batched_tokens=100,
    )
    core = llm.llm_engine
    prompts = {str(n): random_prompt(30 + 70 * (n % 5), n) for n in range(20)}
    for name, prompt in prompts.items():
        core.add_request(name, {"prompt_token_ids": prompt}, greedy(60))
    finished = {}
    for step in range(2000):
        if not core.has_unfinished_requests():
            break
        for output in core.step():
            if output.finished:
                finished[output.request_id] = output
        # Waiting, prefilling, decoding and preempted requests all get their turn.
        if step % 7 == 3 and step // 7 < 10:
            core.abort_request([str(step // 7 * 2)], internal=False)
    assert len(finished) == 10
    kept = [name for name in prompts if name in finished]
    assert_exact(model, [prompts[n] for n in kept], [finished[n] for n in kept])
    assert pool_is_restored(llm)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch, engines: EngineCache) -> Iterator[None]:
    """Asynchronous scheduling: CUDA's default, which vLLM turns off on the CPU platform."""
    update = CpuPlatform.check_and_update_config

    def update_but_stay_asynchronous(_: type[CpuPlatform], vllm_config: VllmConfig) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", classmethod(update_but_stay_asynchronous)
    )
    engines.close()  # not the engine of another test with the same options
    yield
    engines.close()


@pytest.mark.usefixtures("asynchronous")
def test_two_steps_in_flight(model: Path, profile: Path, engines: EngineCache) -> None:
    """Exact in a small pool, although blocks come back a step later."""
    llm = engines.get(
        model,
        profile,
        block_size=BLOCK,
        num_gpu_blocks_override=110,
        enable_prefix_caching=True,
        max_model_len=512,
        max_num_batched_tokens=100,
    )
    assert llm.llm_engine.vllm_config.max_concurrent_batches == 2
    shared = random_prompt(300, 9)
    prompts = [random_prompt(40 + 13 * n, 8) for n in range(12)]
    prompts += [shared + random_prompt(20 + n, n) for n in range(3)]
    with preemptions(llm) as preempted, counted_steps(llm) as steps:
        outputs = generate(llm, prompts, 60)
    assert pool_is_restored(llm)
    assert steps.overlapping > steps.calls / 2
    assert preempted
    assert sum(output.num_cached_tokens or 0 for output in outputs) >= 256
    assert_exact(model, prompts, outputs)


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_steps_are_those_of_stock_vllm(
    model: Path, profile: Path, engines: EngineCache
) -> None:
    """With a plain `Scheduler` every second step would be empty, or hold half of the requests."""
    together = [random_prompt(17 + n, 8) for n in range(4)]
    in_chunks = [random_prompt(40 + 13 * n, 8) for n in range(8)]
    taken = []
    for served in (None, profile):
        llm = engines.get(model, served, block_size=32, max_num_batched_tokens=100)
        assert isinstance(scheduler(llm), AsyncScheduler)
        assert isinstance(scheduler(llm), SplitScheduler) == (served is profile)
        with counted_steps(llm) as few:
            outputs = generate(llm, together, 40)
        with counted_steps(llm) as many:
            outputs += generate(llm, in_chunks, 60)
        assert pool_is_restored(llm)
        taken.append((few, many))
    assert taken[1] == taken[0]
    assert few.empty <= 1
    assert few.overlapping >= 38  # all steps but the first and the last
    assert_exact(model, together + in_chunks, outputs)


def test_all_heads_streaming_holds_a_constant_number_of_blocks(
    model: Path, profile_of: Callable[..., Path], engines: EngineCache
) -> None:
    profile = profile_of(model, ALL_STREAMING, sink=SINK, window=WINDOW)
    llm = engines.get(model, profile, block_size=BLOCK, disable_log_stats=False)
    core = llm.llm_engine
    core.add_request("a", {"prompt_token_ids": random_prompt(1500, 9)}, greedy(100))
    pool = scheduler(llm).kv_cache_manager.block_pool
    groups = len(scheduler(llm).kv_cache_config.kv_cache_groups)
    held = []
    while core.has_unfinished_requests():
        core.step()
        held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        use = BlockUse.taken_from(scheduler(llm).make_stats())
        assert use is not None
        request = next(iter(scheduler(llm).requests.values()), None)
        tokens = request.num_computed_tokens if request else 0
        assert (use.full, use.streaming, use.full_cache) == (0, held[-1], -(-tokens // BLOCK))
    assert max(held) <= groups * (1 + WINDOW // BLOCK + 1)
    assert pool_is_restored(llm)
