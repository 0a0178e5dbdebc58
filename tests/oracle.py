"""The oracle of all engine tests: a plain Hugging Face forward with one mask per KV head."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlkv_vllm.kernels.reference import head_mask

FullHeads = Sequence[Sequence[int]]

_split: tuple[FullHeads, int, int] = ((), 0, 0)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Q, T, D], key and value [B, H, T, D]; no cache, no padding."""
    full_heads, sink, window = _split
    num_kv_heads, length = key.shape[1], query.shape[2]
    group = query.shape[1] // num_kv_heads
    position = torch.arange(length)
    mask_HTS = head_mask(
        position, position, num_kv_heads, full_heads[module.layer_idx], sink, window
    )
    scores = torch.matmul(query, key.repeat_interleave(group, 1).transpose(2, 3)) * scaling
    scores = scores.masked_fill(~mask_HTS.repeat_interleave(group, 0)[None], float("-inf"))
    out = torch.matmul(scores.softmax(-1), value.repeat_interleave(group, 1))
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS["rlkv_oracle"] = _attention


@functools.lru_cache(maxsize=8)
def _model(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config._attn_implementation = "rlkv_oracle"
    return model.eval()


@torch.no_grad()
def logprobs(
    model: Path, token_ids: Sequence[int], full_heads: FullHeads, sink: int, window: int
) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocabulary]`` of the next token after each position."""
    global _split
    _split = (full_heads, sink, window)
    return torch.log_softmax(_model(model)(torch.tensor([list(token_ids)])).logits[0], -1)


def count_differences(
    model: Path,
    prompt: Sequence[int],
    completion: Any,
    full_heads: FullHeads,
    sink: int,
    window: int,
) -> tuple[int, float]:
    """Compare a greedy completion of the engine with the oracle.

    Args:
        completion: vLLM's ``CompletionOutput``, sampled greedily with logprobs.

    Returns:
        Number of tokens that are not the oracle's choice, and the largest
        difference of the chosen tokens' log-probabilities.
    """
    tokens = list(completion.token_ids)
    expected = logprobs(model, [*prompt, *tokens[:-1]], full_heads, sink, window)
    expected = expected[len(prompt) - 1 :]
    wrong = sum(a != b for a, b in zip(expected.argmax(-1).tolist(), tokens, strict=True))
    worst = max(
        abs(expected[i, t].item() - completion.logprobs[i][t].logprob) for i, t in enumerate(tokens)
    )
    return wrong, worst
