"""Engines of which every token is compared with the oracle: the scenarios of tests/gpu.

They run on the engine of the machine: with CUDA graphs on a GPU (tests/gpu/test_engine.py), and in
toy size on the CPU (tests/integration/test_gpu_scenarios.py), which shows that they work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.engine.launch import engine_options
from rlkv_vllm.hf.gated_attention import attach_gates
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS, VOCAB, make_checkpoint
from tests.support.cuda_on_cpu import Result, Scenario, run_scenarios
from tests.support.engines import write_profile
from tests.support.oracle import FullHeads, logprobs

SINK, WINDOW, SPARSITY = 16, 64, 0.6
STOCK, SPLIT, GATED = "stock", "split", "gated"


@dataclass(frozen=True)
class Size:
    """How much an engine is asked.

    Attributes:
        lengths: prompts of the first wave; the second wave has the same with five tokens more.
        many: prompts of the third wave.
        max_tokens: of every answer.
        max_model_len: longest request.
        blocks: of the split pool, too small for the third wave; the others have twice as many.
    """

    lengths: tuple[int, ...]
    many: int
    max_tokens: int
    max_model_len: int
    blocks: int


GPU_SIZE = Size((17, 64, 65, 200, 513, 700), many=30, max_tokens=64, max_model_len=1024, blocks=150)
TOY_SIZE = Size((17, 200), many=12, max_tokens=40, max_model_len=256, blocks=40)


@dataclass(frozen=True)
class Run:
    """What an engine answered to the three waves.

    Attributes:
        model: folder of the model.
        waves: prompts.
        full_heads: of every layer.
        gates: of every wave, in gated mode.
        result: of the engine.
    """

    model: Path
    waves: list[list[list[int]]]
    full_heads: FullHeads
    gates: list[list[list[float]]]
    result: Result

    @property
    def cached(self) -> int:
        """Prompt tokens of the second wave that were found in the prefix cache."""
        first = len(self.waves[0])
        return sum(self.result.cached[first : first + len(self.waves[1])])


@dataclass(frozen=True)
class Difference:
    """An engine's answers beside the oracle's.

    Attributes:
        wrong: tokens that are not the oracle's choice.
        loss: most log-probability that the oracle loses by one of them.
        logprob: largest difference of a token's log-probability.
    """

    wrong: int
    loss: float
    logprob: float


def make_model(folder: Path, dtype: str) -> Path:
    """A random model with weights of `dtype`; the oracle computes in float32 with the same."""
    make_checkpoint("qwen3", folder)
    if dtype == "bfloat16":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def run(model: Path, kind: str, size: Size, folder: Path, **options: Any) -> Run:
    """Chunked prefill, prefix cache and a small pool.

    Args:
        model: of `make_model`.
        kind: STOCK, SPLIT or GATED; gates change before the first and the third wave.
        size: of the scenario.
        folder: for the profile.
        options: of `vllm.LLM`.
    """
    rng = random.Random(1)
    gates = [
        [rng.random() ** (1 + layer) for _ in range(NUM_KV_HEADS)] for layer in range(NUM_LAYERS)
    ]
    full_heads = allocate(gates, SPARSITY if kind == SPLIT else 0.0).full

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    first = [prompt(n) for n in size.lengths]
    waves = [
        first,
        [p + prompt(5) for p in first],
        [prompt(40 + 13 * n) for n in range(size.many)],
    ]
    profile, changes = None, []
    if kind == SPLIT:
        path = folder / "profile.json"
        profile = str(write_profile(model, full_heads, path, sink=SINK, window=WINDOW))
    elif kind == GATED:
        changes = [gates, None, [row[1:] + row[:1] for row in gates]]
        options = engine_options({"mode": "gated", "sink": SINK, "window": WINDOW}) | options
    options = {
        "max_model_len": size.max_model_len,
        "max_num_batched_tokens": 100,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": size.blocks if kind == SPLIT else 2 * size.blocks,
    } | options
    (result,) = run_scenarios(
        [Scenario(str(model), profile, waves, size.max_tokens, options, changes)], interpret=False
    )
    return Run(model, waves, full_heads, [g or gates for g in changes], result)


def compare(run: Run) -> Difference:
    """Every token of an engine against a float32 forward with the same mask per head."""
    losses: list[float] = []
    differences: list[float] = []
    answers = iter(zip(run.result.tokens, run.result.logprobs, strict=True))
    for index, wave in enumerate(run.waves):
        oracle = _oracle(run, index)
        for given in wave:
            tokens, logprobs_found = next(answers)
            expected = oracle(given + tokens[:-1])[len(given) - 1 :]
            chosen = expected.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
            losses += (expected.max(-1).values - chosen).tolist()
            differences += (chosen - torch.tensor(logprobs_found)).abs().tolist()
    return Difference(sum(loss > 0 for loss in losses), max(losses), max(differences))


def _oracle(run: Run, wave: int) -> Callable[[list[int]], torch.Tensor]:
    """Tokens to log-probabilities ``[tokens, vocabulary]``."""
    if not run.gates:
        return lambda tokens: logprobs(run.model, tokens, run.full_heads, SINK, WINDOW)
    trained = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    attach_gates(trained, SINK, WINDOW).set_soft(run.gates[wave])

    @torch.no_grad()
    def gated(tokens: list[int]) -> torch.Tensor:
        return trained(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return gated
