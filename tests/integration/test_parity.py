"""A split engine answers what a plain forward with the same per-head mask answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkv_vllm.engine.config import split_plan
from tests.integration.conftest import random_prompt
from tests.support import ROOT
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS
from tests.support.engines import EngineCache, generate, pool_is_restored
from tests.support.oracle import count_differences, logprobs

#: Layers with some, without any, with all, and with one full head.
UNEVEN = ((0, 1), (), (0, 1, 2, 3), (2,))
ALL_FULL = (tuple(range(NUM_KV_HEADS)),) * NUM_LAYERS
ALL_STREAMING = ((),) * NUM_LAYERS

PROMPT_LENGTHS = (17, 50, 64, 65, 200, 700, 1000)


@pytest.mark.parametrize(
    ("architecture", "block_size", "sink", "window", "full_heads"),
    [
        ("qwen3", 16, 16, 64, UNEVEN),
        ("qwen3", 32, 20, 33, UNEVEN),
        ("qwen3", 16, 0, 64, ALL_STREAMING),
        ("llama", 32, 16, 64, UNEVEN),
        ("llama", 16, 20, 33, UNEVEN),
        ("qwen2", 16, 0, 33, UNEVEN),
        ("qwen2", 32, 20, 64, UNEVEN),
        ("mistral", 16, 20, 64, UNEVEN),
        ("mistral", 32, 0, 33, UNEVEN),
        ("granite", 32, 20, 33, UNEVEN),
        ("ernie4_5", 16, 16, 64, UNEVEN),
    ],
)
def test_equals_the_oracle(
    architecture: str,
    block_size: int,
    sink: int,
    window: int,
    full_heads: tuple[tuple[int, ...], ...],
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
    engines: EngineCache,
) -> None:
    model = checkpoint(architecture)
    profile = profile_of(model, full_heads, sink=sink, window=window)
    llm = engines.get(model, profile, block_size=block_size)
    prompts = [random_prompt(n, 0) for n in PROMPT_LENGTHS]
    for prompt, output in zip(prompts, generate(llm, prompts), strict=True):
        wrong, worst = count_differences(model, prompt, output.outputs[0], full_heads, sink, window)
        assert wrong == 0, f"{wrong} tokens differ for a prompt of {len(prompt)}"
        assert worst < 1e-4
    assert pool_is_restored(llm)


def test_a_model_that_vllm_runs_through_transformers(
    checkpoint: Callable[[str], Path], profile_of: Callable[..., Path], engines: EngineCache
) -> None:
    model = checkpoint("seed_oss")
    expected = [random_prompt(n, 4) for n in (17, 150)]
    # Before the engine starts: it changes the class of the model that the oracle runs.
    for _ in range(20):
        for tokens in expected:
            tokens.append(int(logprobs(model, tokens, UNEVEN, 16, 64)[-1].argmax()))
    llm = engines.get(model, profile_of(model, UNEVEN, sink=16, window=64))
    outputs = generate(llm, [tokens[:-20] for tokens in expected], 20)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        tokens[-20:] for tokens in expected
    ]
    assert pool_is_restored(llm)


def test_compiled_model_equals_the_oracle(
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
    engines: EngineCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM then traces the model as always but leaves inductor, and its C++ compiler, out.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    model = checkpoint("qwen3")
    profile = profile_of(model, UNEVEN, sink=16, window=64)
    llm = engines.get(model, profile, enforce_eager=False)
    prompts = [random_prompt(n, 6) for n in PROMPT_LENGTHS]
    for prompt, output in zip(prompts, generate(llm, prompts), strict=True):
        wrong, worst = count_differences(model, prompt, output.outputs[0], UNEVEN, 16, 64)
        assert wrong == 0
        assert worst < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_oracle_within_rounding(
    dtype: str,
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
    engines: EngineCache,
) -> None:
    model = checkpoint("llama")
    profile = profile_of(model, UNEVEN, sink=16, window=64)
    llm = engines.get(model, profile, dtype=dtype)
    prompts = [random_prompt(n, 5) for n in PROMPT_LENGTHS]
    worst = [
        count_differences(model, prompt, output.outputs[0], UNEVEN, 16, 64)[1]
        for prompt, output in zip(prompts, generate(llm, prompts, 1), strict=True)
    ]
    other = [
        count_differences(model, prompt, output.outputs[0], ALL_FULL, 16, 64)[1]
        for prompt, output in zip(prompts[4:], generate(llm, prompts[4:], 1), strict=True)
    ]
    assert max(worst) < 0.1
    # Another mask is much further away than rounding.
    assert max(other) > 5 * max(worst)


@pytest.mark.parametrize(
    ("cache_dtype", "rounding"),
    [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_a_cache_of_8_bits_is_the_oracle_with_rounded_keys(
    cache_dtype: str,
    rounding: torch.dtype,
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
    engines: EngineCache,
) -> None:
    """In chunks, and again from the prefix cache: each sees the same rounded keys."""
    model = checkpoint("qwen3")
    profile = profile_of(model, UNEVEN, sink=16, window=64)
    llm = engines.get(
        model,
        profile,
        kv_cache_dtype=cache_dtype,
        max_num_batched_tokens=300,
        enable_prefix_caching=True,
    )
    assert split_plan(llm.llm_engine.vllm_config).geometry.dtype_bytes == 1
    prompts = [random_prompt(n, 0) for n in (17, 64, 200, 700)]
    outputs = generate(llm, prompts, 40)
    again = generate(llm, prompts, 40)
    assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // 32 * 32 for p in prompts]
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert pool_is_restored(llm)

    def worst(heads: tuple[tuple[int, ...], ...], dtype: torch.dtype | None) -> float:
        return max(
            count_differences(model, prompt, output.outputs[0], heads, 16, 64, dtype)[1]
            for prompt, output in zip(prompts, outputs, strict=True)
        )

    # A key that differs in its last bit may be rounded to another 8-bit number.
    right = worst(UNEVEN, rounding)
    assert right < 0.1
    assert worst(UNEVEN, None) > 5 * right
    assert worst(ALL_FULL, rounding) > 5 * right


_STOCK = """
import json, sys
from tests.support.engines import engine, generate
from pathlib import Path
model, options, prompts = json.loads(sys.stdin.read())
with engine(Path(model), **options) as llm:
    completions = [output.outputs[0] for output in generate(llm, prompts)]
    print("RESULT", json.dumps([
        [list(c.token_ids), [p[t].logprob for p, t in zip(c.logprobs, c.token_ids)]]
        for c in completions
    ]))
"""


def stock(model: Path, prompts: list[list[int]], **options: Any) -> list[Any]:
    """Tokens and log-probabilities of vLLM without any plugin, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _STOCK],
        input=json.dumps([str(model), options, prompts]),
        env=os.environ | {"VLLM_PLUGINS": "none"},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    result: list[Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


@pytest.mark.parametrize("block_size", [32, 128])
def test_all_full_profile_and_idle_plugin_equal_stock_vllm(
    block_size: int,
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
    engines: EngineCache,
) -> None:
    model = checkpoint("qwen3")
    prompts = [random_prompt(n, 1) for n in PROMPT_LENGTHS]
    expected = stock(model, prompts, block_size=block_size)
    all_full = profile_of(model, ALL_FULL, sink=16, window=64)
    for profile in (None, all_full):
        llm = engines.get(model, profile, block_size=block_size)
        for (tokens, stocks), output in zip(expected, generate(llm, prompts), strict=True):
            completion = output.outputs[0]
            assert list(completion.token_ids) == tokens
            ours = [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]
            assert ours == stocks
        assert pool_is_restored(llm)
