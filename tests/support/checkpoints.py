"""Random checkpoints with sharp attention, small enough for tests.

Attention is sharpened so that a wrong key changes the answer: with the usual
initialisation attention is nearly uniform and a mistake drowns in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)

ARCHITECTURES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

#: Served as well; not gated.
OTHERS: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "ernie4_5": (Ernie4_5Config, Ernie4_5ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
}

NUM_LAYERS, NUM_KV_HEADS, NUM_Q_HEADS, HEAD_DIM, VOCAB = 4, 4, 8, 32, 512


def make_checkpoint(architecture: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random float32 checkpoint without a tokenizer and return its folder."""
    config_cls, model_cls = (ARCHITECTURES | OTHERS)[architecture]
    settings: dict[str, Any] = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_attention_heads": NUM_Q_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "attention_multiplier": HEAD_DIM**-0.5,  # Granite's, whose default is 1
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = config_cls(**(settings | overrides))
    torch.manual_seed(seed)
    model = model_cls(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(1.8)
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(1.8)
            if name.endswith("embed_tokens.weight"):
                weight.normal_(0, 1)
    model.save_pretrained(path)
    return path
