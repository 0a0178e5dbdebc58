"""Models of real size without trained weights, on which the time of a step does not depend."""

from __future__ import annotations

import random
import re
from datetime import date
from pathlib import Path

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.planning.roofline import ModelSize
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.profile.schema import HeadProfile, Provenance

PREFIX = "random:"
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(?:@(\d+))?")


def parse_shape(name: str) -> ModelSize:
    """Sizes of `random:LAYERSxKV_HEADSxHEAD_DIM[@HIDDEN]`.

    Two query heads per KV head and a feed-forward layer three times as wide as the model.

    Raises:
        RlkvError: the text is no shape.
    """
    match = _SHAPE.fullmatch(name.removeprefix(PREFIX))
    if match is None or "0" in (match[1], match[2], match[3], match[4]):
        raise RlkvError(
            f"model {name}: write {PREFIX}LAYERSxKV_HEADSxHEAD_DIM, for example "
            f"{PREFIX}28x8x128, with @HIDDEN for a width of your own"
        )
    layers, kv_heads, head_dim = int(match[1]), int(match[2]), int(match[3])
    hidden = int(match[4]) if match[4] else kv_heads * head_dim
    return ModelSize(layers, hidden, 3 * hidden, 2 * kv_heads, kv_heads, head_dim)


def write_model(shape: ModelSize, folder: Path, *, sink: int, window: int) -> None:
    """Write a configuration without weights, and ``profile.json`` with random gates."""
    from transformers import Qwen3Config

    Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=65536,
        tie_word_embeddings=shape.tied,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    rng = random.Random(0)
    profile = HeadProfile(
        model=load_model_fingerprint(str(folder)),
        gates=[[rng.random() for _ in range(shape.kv_heads)] for _ in range(shape.layers)],
        sink=sink,
        window=window,
        provenance=Provenance(method="random", created=date.today()),
    )
    save_profile(profile, folder / "profile.json")
