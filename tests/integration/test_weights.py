"""Quantised weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.conftest import random_prompt
from tests.integration.test_parity import ALL_FULL, UNEVEN
from tests.support.engines import EngineCache, generate
from tests.support.oracle import count_differences

SINK, WINDOW = 16, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = dict[str, torch.Tensor]


def rewritten(model: Path, path: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, path)
    weights = change(load_file(model / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def projections(weights: Weights) -> list[str]:
    return [
        name for name in weights if name.split(".")[-2:] in [[p, "weight"] for p in PROJECTIONS]
    ]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


def test_weights_of_8_bits_are_the_oracle_within_rounding(
    model: Path,
    profile_of: Callable[..., Path],
    engines: EngineCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """compressed-tensors W8A8; the oracle has the same weights, but no 8-bit activations."""
    # With AMX, vLLM 0.32 takes a kernel that has no float32 activations.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    def quantise(weights: Weights) -> Weights:
        for name in projections(weights):
            scale = weights[name].abs().amax(1, keepdim=True) / 127
            weights[f"{name}_scale"] = scale
            weights[name] = (weights[name] / scale).round().to(torch.int8)
        return weights

    def dequantise(weights: Weights) -> Weights:
        weights = quantise(weights)
        for name in projections(weights):
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
