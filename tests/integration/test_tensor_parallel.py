"""Several tensor-parallel ranks answer what one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.profile.io import load_profile
from tests.integration.conftest import random_prompt
from tests.integration.test_parity import UNEVEN
from tests.support.engines import run_script
from tests.support.oracle import count_differences

_ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from rlkv_vllm.engine.launch import engine_options
if __name__ == "__main__":
    model, profile, ranks, max_tokens, prompts = json.loads(sys.stdin.read())
    llm = LLM(
        model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024,
        tensor_parallel_size=ranks, kv_cache_memory_bytes=32 << 20, block_size=16,
        **engine_options({"profile": profile}),
    )
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    print("RESULT", json.dumps([
        llm.collective_rpc("rlkv_split_report"),
        [[list(c.token_ids), [p[t].logprob for p, t in zip(c.logprobs, c.token_ids)]]
         for c in completions],
    ]), flush=True)
"""


def served_by(
    ranks: int, folder: Path, model: Path, profile: Path, prompts: list[list[int]], max_tokens: int
) -> Any:
    given = [str(model), str(profile), ranks, max_tokens, prompts]
    return run_script(_ENGINE, folder, given, timeout=600)


@pytest.mark.parametrize(
    ("ranks", "full_heads"),
    [
        (2, UNEVEN),
        (2, ((), (), (1,), ())),
        pytest.param(
            *(4, ((), (), (1,), ())),
            marks=pytest.mark.skipif(
                "RLKV_TEST_TP4" not in os.environ,
                reason="4 ranks in busy loops: set RLKV_TEST_TP4=1 on an idle machine",
            ),
        ),
    ],
    ids=["two ranks", "one of two without full heads", "three of four without full heads"],
)
def test_ranks_equal_the_oracle(
    ranks: int,
    full_heads: tuple[tuple[int, ...], ...],
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    profile_of: Callable[..., Path],
) -> None:
    model = checkpoint("qwen3")
    path = profile_of(model, full_heads, sink=16, window=64)
    profile = load_profile(path)
    assert profile.recommended_sparsity is not None
    allocation = allocate(profile.gates, profile.recommended_sparsity, ranks)
    prompts = [random_prompt(n, 11) for n in (17, 200, 700)]
    # vLLM's CPU ranks wait for each other in busy loops: more of them than cores are slow.
    reports, completions = served_by(ranks, tmp_path, model, path, prompts, 200 // ranks**2)
    assert [report["active"] for report in reports] == [True] * ranks
    assert [r["full_head_caches"] for r in reports] == [
        allocation.num_full_on(r) for r in range(ranks)
    ]
    for prompt, (tokens, logprobs) in zip(prompts, completions, strict=True):
        completion = SimpleNamespace(
            token_ids=tokens,
            logprobs=[
                {token: SimpleNamespace(logprob=value)}
                for token, value in zip(tokens, logprobs, strict=True)
            ],
        )
        wrong, worst = count_differences(model, prompt, completion, allocation.full, 16, 64)
        assert wrong == 0
        assert worst < 1e-4
