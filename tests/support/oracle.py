"""The oracle of all engine tests: a plain Hugging Face forward with one mask per KV head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlkv_vllm.kernels.reference import head_mask

FullHeads = Sequence[Sequence[int]]

_split: tuple[FullHeads, int, int, torch.dtype | None] = ((), 0, 0, None)


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers cut off to an 8-bit type, as vLLM's CPU kernel does for its caches."""
    info = torch.finfo(dtype)
    bits = 23 + int(math.log2(info.eps))
    cut = (x.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)
    step = info.smallest_normal * info.eps
    cut = torch.where(x.abs() < info.smallest_normal, torch.trunc(x / step) * step, cut)
    return cut.clamp(info.min, info.max)


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
    full_heads, sink, window, cache_dtype = _split
    num_kv_heads, length = key.shape[1], query.shape[2]
    if cache_dtype is not None:
        is_full_H11 = torch.tensor([h in full_heads[module.layer_idx] for h in range(num_kv_heads)])
        key, value = (
            torch.where(is_full_H11[:, None, None], truncated(x, cache_dtype), rounded)
            for x in (key, value)
            for rounded in (x.to(cache_dtype).to(x.dtype),)
        )
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
    model: Path,
    token_ids: Sequence[int],
    full_heads: FullHeads,
    sink: int,
    window: int,
    cache_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocabulary]`` of the next token after each position.

    Keys and values are rounded to ``cache_dtype`` where one is given: cut off in full heads,
    to the nearest in streaming heads.
    """
    global _split
    _split = (full_heads, sink, window, cache_dtype)
    return torch.log_softmax(_model(model)(torch.tensor([list(token_ids)])).logits[0], -1)


def count_differences(
    model: Path,
    prompt: Sequence[int],
    completion: Any,
    full_heads: FullHeads,
    sink: int,
    window: int,
    cache_dtype: torch.dtype | None = None,
) -> tuple[int, float]:
    """Compare a greedy completion of the engine with the oracle.

    Args:
        completion: vLLM's ``CompletionOutput``, sampled greedily with logprobs.

    Returns:
        Number of tokens that are not the oracle's choice, and the largest
        difference of the chosen tokens' log-probabilities.
    """
    tokens = list(completion.token_ids)
    expected = logprobs(model, [*prompt, *tokens[:-1]], full_heads, sink, window, cache_dtype)
    expected = expected[len(prompt) - 1 :]
    wrong = sum(a != b for a, b in zip(expected.argmax(-1).tolist(), tokens, strict=True))
    worst = max(
        abs(expected[i, t].item() - completion.logprobs[i][t].logprob) for i, t in enumerate(tokens)
    )
    return wrong, worst
