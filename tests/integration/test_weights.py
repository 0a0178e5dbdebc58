"""Adapters and quantised weights: what changes the projections leaves the split exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

from tests.engines import EngineCache, generate, pool_is_restored
from tests.integration.conftest import random_prompt
from tests.integration.test_parity import ALL_FULL, UNEVEN
from tests.oracle import count_differences

SINK, WINDOW, RANK, ALPHA = 16, 64, 4, 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = dict[str, torch.Tensor]


def rewritten(model: Path, path: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, path)
    weights = change(load_file(model / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def projections(weights: Weights) -> list[str]:
    return [name for name in weights if name.split(".")[-2] in PROJECTIONS]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


def test_an_adapter_beside_its_base(
    model: Path, profile_of: Callable[..., Path], engines: EngineCache, tmp_path: Path
) -> None:
    """Batched together and from the prefix cache; the oracle has the adapter merged."""
    torch.manual_seed(1)
    adapter: Weights = {}

    def merge(weights: Weights) -> Weights:
        for name in projections(weights):
            rows, columns = weights[name].shape
            a = torch.randn(RANK, columns) * columns**-0.5
            b = torch.randn(rows, RANK) * 0.3
            module = "base_model.model." + name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = a
            adapter[f"{module}.lora_B.weight"] = b
            weights[name] += ALPHA / RANK * b @ a
        return weights

    merged = rewritten(model, tmp_path / "merged", merge)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(PROJECTIONS),
        "base_model_name_or_path": str(model),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))

    profile = profile_of(model, UNEVEN, sink=SINK, window=WINDOW)
    llm = engines.get(
        model,
        profile,
        enable_lora=True,
        max_lora_rank=8,
        enable_prefix_caching=True,
        max_num_batched_tokens=300,
    )
    lora = LoRARequest("adapter", 1, str(folder))
    prompts = [random_prompt(n, 3) for n in (17, 200, 700) for _ in range(2)]
    whose = [None, lora] * 3
    for turn in range(2):
        outputs = generate(llm, prompts, lora_request=whose)
        for prompt, one, output in zip(prompts, whose, outputs, strict=True):
            wrong, worst = count_differences(
                merged if one else model, prompt, output.outputs[0], UNEVEN, SINK, WINDOW
            )
            assert wrong == 0
            assert worst < 1e-3
            assert output.num_cached_tokens == ((len(prompt) - 1) // 16 * 16 if turn else 0)
    assert pool_is_restored(llm)


def test_weights_of_8_bits_are_the_oracle_within_rounding(
    model: Path, profile_of: Callable[..., Path], engines: EngineCache, tmp_path: Path
) -> None:
    """compressed-tensors W8A8; the oracle has the same weights, but no 8-bit activations."""

    def quantise(weights: Weights) -> Weights:
        for name in projections(weights):
            scale = weights[name].abs().amax(1, keepdim=True) / 127
            weights[f"{name}_scale"] = scale
            weights[name] = (weights[name] / scale).round().to(torch.int8)
        return weights

    def dequantise(weights: Weights) -> Weights:
        weights = quantise(weights)
        for name in projections(weights):
            if weights[name].dtype == torch.int8:
                weights[name] = weights[name] * weights.pop(f"{name}_scale")
        return weights

    reference = rewritten(model, tmp_path / "reference", dequantise)
    quantised = rewritten(model, tmp_path / "quantised", quantise)
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"strategy": "channel", "dynamic": False},
                "input_activations": scheme | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (quantised / "config.json").write_text(json.dumps(config))

    llm = engines.get(quantised, profile_of(quantised, UNEVEN, sink=SINK, window=WINDOW))
    prompts = [random_prompt(n, 5) for n in (64, 200, 700, 1000)]
    right, other = (
        [
            count_differences(reference, prompt, output.outputs[0], heads, SINK, WINDOW)[1]
            for prompt, output in zip(prompts, generate(llm, prompts, 1), strict=True)
        ]
        for heads in (UNEVEN, ALL_FULL)
    )
    assert max(right) < 0.3
    assert max(other) > 5 * max(right)
