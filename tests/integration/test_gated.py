"""An engine in gated mode answers what the profile job's own gated model answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlkv_vllm.engine.gated.live import LiveGates, gates_version, get_gates, set_gates
from rlkv_vllm.engine.launch import engine_options
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import attach_gates
from tests.integration.conftest import random_prompt
from tests.integration.test_parity import ALL_FULL, UNEVEN, stock
from tests.support.checkpoints import ARCHITECTURES, NUM_KV_HEADS, NUM_LAYERS
from tests.support.engines import EngineCache, generate, pool_is_restored, run_script, scheduler
from tests.support.oracle import count_differences

SINK, WINDOW = 5, 33
GATED = {"mode": "gated", "sink": SINK, "window": WINDOW}
LENGTHS = (1, 17, 40, 64, 200, 700)


@pytest.fixture
def gated(engines: EngineCache) -> Callable[..., Any]:
    """Engines in gated mode, the last one shared."""
    return partial(engines.get, max_model_len=1024, **engine_options(GATED))


def random_gates(seed: int) -> list[list[float]]:
    """Gates between 0 and 1, and some at the ends."""
    rng = random.Random(seed)
    values = [rng.choice([0.0, 1.0, rng.random(), rng.random()]) for _ in range(64)]
    return [values[i * NUM_KV_HEADS : (i + 1) * NUM_KV_HEADS] for i in range(NUM_LAYERS)]


@torch.no_grad()
def differences(
    model: Path, gates: Sequence[Sequence[float]], prompts: Any, completions: Any
) -> tuple[int, float]:
    """Tokens that the trainer's model would not have chosen, and the worst log-probability."""
    wrong, worst = 0, 0.0
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with attach_gates(trained, SINK, WINDOW) as attached:
        attached.set_soft(gates)
        for prompt, (tokens, logprobs) in zip(prompts, completions, strict=True):
            logits = trained(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
            expected = logits.log_softmax(-1)
            wrong += sum(a != b for a, b in zip(expected.argmax(-1).tolist(), tokens, strict=True))
            found = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
            worst = max(worst, (found - torch.tensor(logprobs)).abs().max().item())
    return wrong, worst


def sampled(completion: Any) -> tuple[list[int], list[float]]:
    tokens = list(completion.token_ids)
    return tokens, [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equals_the_trainers_gated_model(
    architecture: str, checkpoint: Callable[[str], Path], gated: Callable[..., Any]
) -> None:
    model = checkpoint(architecture)
    # Chunks of prompts, a prefix cache, and a pool in which requests preempt each other.
    llm = gated(
        model,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=8 << 20,
    )
    prompts = [random_prompt(n, 3) for n in LENGTHS]
    for seed in (1, 2):
        gates = random_gates(seed)
        before = get_gates(llm).version
        assert set_gates(llm, gates) == before + 1
        assert get_gates(llm).gates == torch.tensor(gates).tolist()
        outputs = generate(llm, prompts, 40)
        # Nothing of earlier gates is hit, and the very same again is.
        assert [output.num_cached_tokens for output in outputs] == [0] * len(prompts)
        assert {gates_version(output.outputs[0]) for output in outputs} == {before + 1}
        again = generate(llm, prompts, 40)
        assert again[-1].num_cached_tokens > 600
        for found in (outputs, again):
            wrong, worst = differences(
                model, gates, prompts, [sampled(output.outputs[0]) for output in found]
            )
            assert wrong == 0
            assert worst < 1e-4
    assert pool_is_restored(llm)


@pytest.mark.parametrize("full_heads", [ALL_FULL, UNEVEN], ids=["full heads", "the serving split"])
def test_closed_and_open_gates_are_streaming_and_full_heads(
    full_heads: Any, checkpoint: Callable[[str], Path], gated: Callable[..., Any]
) -> None:
    model = checkpoint("qwen3")
    llm = gated(model, kv_cache_memory_bytes=6 << 20)
    set_gates(llm, [[float(h in row) for h in range(NUM_KV_HEADS)] for row in full_heads])
    prompts = [random_prompt(n, 4) for n in (200, 190, 180, 200, 17, 64) * 2]
    preempted = scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks
    outputs = generate(llm, prompts, 60)
    assert preempted < 12 * 200 // 32, "the pool must be too small for all requests"
    for prompt, output in zip(prompts, outputs, strict=True):
        wrong, worst = count_differences(model, prompt, output.outputs[0], full_heads, SINK, WINDOW)
        assert wrong == 0
        assert worst < 1e-4


def test_open_gates_equal_stock_vllm(
    checkpoint: Callable[[str], Path], gated: Callable[..., Any]
) -> None:
    model = checkpoint("qwen3")
    prompts = [random_prompt(n, 4) for n in (200, 17, 64)]
    llm = gated(model, kv_cache_memory_bytes=6 << 20)
    set_gates(llm, [[1.0] * NUM_KV_HEADS] * NUM_LAYERS)
    outputs = generate(llm, prompts)
    for (tokens, logprobs), output in zip(stock(model, prompts), outputs, strict=True):
        ours = sampled(output.outputs[0])
        assert ours[0] == tokens
        assert ours[1] == pytest.approx(logprobs, abs=1e-4)


def test_wrong_gates_are_refused_and_nothing_changes(
    checkpoint: Callable[[str], Path], gated: Callable[..., Any], engines: EngineCache
) -> None:
    llm = gated(checkpoint("qwen3"), kv_cache_memory_bytes=6 << 20)
    before = get_gates(llm)
    good = before.gates
    for gates, reason in [
        (good[1:], "3 layers"),
        ([row[1:] for row in good], "of 3 KV heads"),
        ([[2.0, *row[1:]] for row in good], "must be from 0 to 1"),
        ([[float("nan"), *row[1:]] for row in good], "must be from 0 to 1"),
    ]:
        with pytest.raises(RlkvError, match=reason):
            set_gates(llm, gates)
    assert get_gates(llm) == before
    with pytest.raises(RlkvError, match="workers have gates of versions"):
        LiveGates.of([{"version": v, "kv_heads": [[0]], "gates": [[1.0]]} for v in (1, 2)])


_SERVER = """
import asyncio, json, sys
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from rlkv_vllm.engine.gated.live import GET_METHOD, GatesUpdater, LiveGates, gates_version
from rlkv_vllm.engine.launch import engine_options

async def ask(engine, prompt, i):
    params = SamplingParams(
        temperature=0, max_tokens=20 + 10 * (i % 4), logprobs=0, ignore_eos=True, detokenize=False
    )
    async for output in engine.generate({"prompt_token_ids": prompt}, params, f"r{i}"):
        pass
    c = output.outputs[0]
    return [gates_version(c), list(c.token_ids),
            [p[t].logprob for p, t in zip(c.logprobs, c.token_ids)]]

async def main():
    model, config, prompts, versions = json.loads(sys.stdin.read())
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024,
        tensor_parallel_size=2, kv_cache_memory_bytes=32 << 20, **engine_options(config),
    ))
    updater = GatesUpdater(engine, LiveGates.of(await engine.collective_rpc(GET_METHOD)))
    tasks = []
    for i in range(0, len(prompts), 4):
        group = [asyncio.create_task(ask(engine, prompts[j], j)) for j in range(i, i + 4)]
        tasks += group
        await asyncio.wait(group, return_when=asyncio.FIRST_COMPLETED)
        tasks.append(asyncio.create_task(updater.set(versions[i // 4])))
        # The next prompts come after the pause, whatever way each of them takes.
        while updater.now.version <= i // 4 and not await engine.is_paused():
            await asyncio.sleep(0.005)
    done = await asyncio.gather(*tasks)
    print("RESULT", json.dumps([[d for d in done if isinstance(d, list)], updater.now.version]),
          flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_two_ranks_change_gates_under_load(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    """Every answer belongs to one version, and is that of a model with its gates."""
    model = checkpoint("llama")
    prompts = [random_prompt(n, 5) for n in (17, 90, 200, 64) * 4]
    versions = [random_gates(seed) for seed in (5, 6, 7, 8)]
    answers, last = run_script(
        _SERVER, tmp_path, [str(model), GATED, prompts, versions], timeout=600
    )
    assert last == 4
    assert {version for version, _, _ in answers} == {0, 1, 2, 3}
    all_gates = [[[1.0] * NUM_KV_HEADS] * NUM_LAYERS, *versions]
    for version in range(5):
        chosen = [i for i, answer in enumerate(answers) if answer[0] == version]
        wrong, worst = differences(
            model,
            all_gates[version],
            [prompts[i] for i in chosen],
            [answers[i][1:] for i in chosen],
        )
        assert wrong == 0
        assert worst < 1e-4
