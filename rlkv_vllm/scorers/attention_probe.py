"""Attention weights of a forward pass, for scorers that look at them.

Shape suffixes: H KV heads, G query heads per KV head, Q query heads (``Q = H * G``), T query
tokens, S key tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.scorers.scorer import ScoringInput

IMPLEMENTATION = "rlkv_probe"
#: Query tokens whose weights exist at once: 32 heads and 8,000 keys in float32 are 0.5 GB.
BLOCK = 512

#: Called with a sample, the layer, the position of the first query of the block, and the
#: attention weights ``[Q, T, S]`` of the block, float32. Query t predicts token t + 1.
Observer = Callable[[Sample, int, int, torch.Tensor], None]

_now: ContextVar[tuple[Sample, Observer]] = ContextVar("_now")


def observe_answers(given: ScoringInput, observer: Observer) -> None:
    """Show `observer` the attention of every layer while the answers are predicted.

    One forward pass per sample; the model is left as it was. An `RlkvError` if its attention
    cannot be replaced, as for gates.
    """
    attach_gates(given.model, given.sink, given.window).detach()  # refuses what has no gates
    model, before = given.model, given.model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        for done, sample in enumerate(given.samples, start=1):
            ids = torch.tensor([sample.prompt_ids + sample.completion_ids], device=model.device)
            token = _now.set((sample, observer))
            try:
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False, logits_to_keep=1)
            finally:
                _now.reset(token)
            given.report(done, len(given.samples))
    finally:
        model.set_attn_implementation(before)


def head_sums(
    given: ScoringInput,
    measure: Callable[[Sample, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum over all answers of what `measure` finds in the attention of every head.

    `measure` gets a sample, the positions ``[T]`` of a block of queries, the keys ``[T, S]`` that a
    streaming head does not see, and the weights ``[Q, T, S]``; it returns ``[Q]``. The sums are
    ``[layers, KV heads, query heads per KV head]``, float64 on the CPU.
    """
    config = given.model.config.get_text_config()
    sums_LQ = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)

    def observe(sample: Sample, layer: int, first: int, weights_QTS: torch.Tensor) -> None:
        num_queries, num_keys = weights_QTS.shape[1:]
        queries_T = torch.arange(first, first + num_queries, device=weights_QTS.device)
        far_TS = beyond(queries_T, num_keys, given.sink, given.window)
        sums_LQ[layer] += measure(sample, queries_T, far_TS, weights_QTS).double().cpu()

    observe_answers(given, observe)
    return sums_LQ.reshape(len(sums_LQ), config.num_key_value_heads, -1)


def beyond(queries: torch.Tensor, num_keys: int, sink: int, window: int) -> torch.Tensor:
    """Keys ``[T, S]`` that a full head sees and a streaming head does not, by position ``[T]``."""
    key_1S = torch.arange(num_keys, device=queries.device)[None]
    return (key_1S >= sink) & (key_1S <= queries[:, None] - window)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, and the weights of the queries that predict the answer."""
    sample, observer = _now.get()
    num_heads, num_tokens, size = query.shape[1:]
    key_H1SD = key[0][:, None].float()
    query_HGSD = query[0].reshape(key.shape[1], -1, num_tokens, size).float()
    scale = size**-0.5 if scaling is None else scaling
    position_S = torch.arange(num_tokens, device=query.device)
    for start in range(len(sample.prompt_ids) - 1, num_tokens - 1, BLOCK):
        stop = min(start + BLOCK, num_tokens - 1)
        logits_HGTS = query_HGSD[:, :, start:stop] @ key_H1SD.transpose(-1, -2) * scale
        future_TS = position_S[None] > position_S[start:stop, None]
        weights_HGTS = logits_HGTS.masked_fill_(future_TS, -torch.inf).softmax(-1)
        observer(sample, module.layer_idx, start, weights_HGTS.reshape(num_heads, -1, num_tokens))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


# Both or neither: a name missing from the mask registry silently means no mask at all.
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
