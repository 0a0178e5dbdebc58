"""The architecture of the embedded reasoner."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3ForCausalLM

MAX_LENGTH = 2048


def build_model(vocab_size: int, pad_id: int, end_id: int) -> Qwen3ForCausalLM:
    """A randomly initialised model in float32; seed torch before.

    20 KV heads, so that sparsities .2, .4, .5, .6 and .8 are whole numbers of heads.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config: Qwen3Config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=pad_id,
        eos_token_id=end_id,
        bos_token_id=None,
    )
    model: Qwen3ForCausalLM = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=end_id, pad_token_id=pad_id, do_sample=False
    )
    return model
