"""The CUDA backend inside the real engine, its kernels under Triton's interpreter.

The interpreter takes tens of milliseconds per program: few layers, heads, requests and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlkv_vllm.engine.launch import engine_options
from tests.integration.conftest import random_prompt
from tests.integration.test_gated import GATED, random_gates
from tests.integration.test_gated import differences as gated_differences
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_on_cpu import Result, Scenario, run_scenarios
from tests.support.oracle import count_differences

pytest.importorskip("triton")

SINK, WINDOW, BLOCK = 16, 33, 16
#: Two full heads and a streaming one in one cache group each; no full head and streaming heads
#: in two cache groups, which takes two kernel calls.
UNEVEN = ((0, 2), ())
ALL_FULL = ((0, 1, 2), (0, 1, 2))
MAX_TOKENS = 12
LONG = random_prompt(100, 3)
#: A prompt that is prefilled in chunks beside a running request; then the same again, found in the
#: prefix cache, with more requests than the pool can let finish.
WAVES = [
    [random_prompt(9, 2), LONG],
    [LONG, random_prompt(14, 5), random_prompt(15, 6), random_prompt(12, 7)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        "qwen3",
        tmp_path_factory.mktemp("small") / "qwen3",
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )


#: In gated mode: of both waves, then of one more.
GATES = [[row[:3] for row in random_gates(seed)[:2]] for seed in (1, 2)]
GATED_WAVES = [*WAVES, [random_prompt(60, 8)]]


@pytest.fixture(scope="module")
def results(model: Path, profile_of: Callable[..., Path]) -> list[Result]:
    options = {
        "block_size": BLOCK,
        "max_model_len": 128,
        "max_num_batched_tokens": 40,
        "enable_prefix_caching": True,
    }
    uneven, all_full = (
        str(profile_of(model, full_heads, sink=SINK, window=WINDOW))
        for full_heads in (UNEVEN, ALL_FULL)
    )
    gated = engine_options(GATED) | {"num_gpu_blocks_override": 13, "block_size": BLOCK}
    return run_scenarios(
        [
            Scenario(
                str(model), uneven, WAVES, MAX_TOKENS, options | {"num_gpu_blocks_override": 26}
            ),
            Scenario(str(model), all_full, [[random_prompt(50, 7)]], 6, options),
            Scenario(
                str(model),
                None,
                GATED_WAVES,
                MAX_TOKENS,
                options | gated,
                [GATES[0], None, GATES[1]],
            ),
        ]
    )


def differences(
    model: Path, prompts: list[list[int]], result: Result, full_heads: tuple[tuple[int, ...], ...]
) -> list[tuple[int, float]]:
    return [
        count_differences(
            model,
            prompt,
            SimpleNamespace(
                token_ids=tokens,
                logprobs=[
                    {token: SimpleNamespace(logprob=value)}
                    for token, value in zip(tokens, logprobs, strict=True)
                ],
            ),
            full_heads,
            SINK,
            WINDOW,
        )
        for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True)
    ]


def test_split_equals_the_oracle_under_all_that_the_scheduler_does(
    model: Path, results: list[Result]
) -> None:
    split, _, _ = results
    assert split.implementation == "SplitCUDAImpl"
    assert split.parts == [1, 2]
    prompts = [prompt for wave in WAVES for prompt in wave]
    found = differences(model, prompts, split, UNEVEN)
    assert [wrong for wrong, _ in found] == [0] * len(prompts)
    assert max(worst for _, worst in found) < 1e-4
    check_all_was_tested(split)


def check_all_was_tested(result: Result) -> None:
    assert result.restored
    assert result.chunks >= 2
    assert result.mixed >= 2
    assert max(result.cached) == 96
    assert result.preemptions >= 1


def test_gated_mode_equals_the_trainers_model_under_all_that_the_scheduler_does(
    model: Path, results: list[Result]
) -> None:
    *_, gated = results
    assert gated.implementation == "GatedCUDAImpl"
    prompts = [prompt for wave in GATED_WAVES for prompt in wave]
    answers = list(zip(gated.tokens, gated.logprobs, strict=True))
    for gates, part in zip(GATES, (slice(0, -1), slice(-1, None)), strict=True):
        wrong, worst = gated_differences(model, gates, prompts[part], answers[part])
        assert wrong == 0
        assert worst < 1e-4
    check_all_was_tested(gated)


def test_all_full_heads_equal_the_oracle(model: Path, results: list[Result]) -> None:
    _, full, _ = results
    assert full.implementation == "SplitCUDAImpl"
    assert full.parts == [1, 1]
    ((wrong, worst),) = differences(model, [random_prompt(50, 7)], full, ALL_FULL)
    assert wrong == 0
    assert worst < 1e-4
