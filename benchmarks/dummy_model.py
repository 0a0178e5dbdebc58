"""Models without weights and contexts without computation, for the engine benchmarks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the time of a step depends on nothing else."""

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 4096

    @property
    def token_bytes(self) -> int:
        """Key and value of one token in all heads, at two bytes per element."""
        return self.layers * self.kv_heads * 2 * self.head_dim * 2

    @property
    def weight_bytes(self) -> int:
        """Weights that a decode step reads, at two bytes per element."""
        heads = (2 * self.q_heads + 2 * self.kv_heads) * self.head_dim
        return 2 * (
            self.layers * self.hidden * (heads + 3 * self.intermediate) + self.hidden * self.vocab
        )


def write_model(shape: Shape, folder: Path, *, sink: int, window: int) -> None:
    """A configuration without weights, and ``profile.json`` with uneven random gates."""
    from transformers import Qwen3Config

    from rlkv_vllm.profile.io import load_model_fingerprint, save_profile
    from rlkv_vllm.profile.schema import HeadProfile, Provenance

    Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
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


def enter_into_prefix_cache(llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> None:
    """Let the prompts be found in the prefix cache as if they had been computed.

    The engine runs in this process; the pages hold whatever they hold.
    """
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    for i, prompt in enumerate(prompts):
        request = Request(
            request_id=f"warm-{i}",
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=core.request_block_hasher,
        )
        manager.new_step_starts()
        assert manager.allocate_slots(request, len(prompt)) is not None, "the cache is too small"
        manager.take_new_block_ids()
        manager.free(request)
