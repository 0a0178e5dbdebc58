"""`attention-mass`: how much attention lies where a streaming head cannot look.

The obvious measure (used for static head or layer budgets, e.g. MInference, arXiv 2407.02490, and
FastGen, arXiv 2310.01801): share of a head's attention on keys outside sink and window, mean over
the tokens of the answers and over the query heads of a KV head.
"""

from __future__ import annotations

import torch

from rlkv_vllm.scorers.attention_probe import beyond, observe_answers
from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput, to_gates


def score_heads(given: ScoringInput) -> Gates:
    """Mean attention mass beyond sink and window per KV head, mapped onto [0, 1]."""
    config = given.model.config.get_text_config()
    mass_LQ = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)

    def observe(sample: Sample, layer: int, first: int, weights_QTS: torch.Tensor) -> None:
        num_queries, num_keys = weights_QTS.shape[1:]
        queries_T = torch.arange(first, first + num_queries, device=weights_QTS.device)
        far_TS = beyond(queries_T, num_keys, given.sink, given.window)
        mass_Q = (weights_QTS * far_TS).sum((1, 2)) / len(sample.completion_ids)
        mass_LQ[layer] += mass_Q.double().cpu()

    observe_answers(given, observe)
    heads = config.num_key_value_heads
    return to_gates(mass_LQ.reshape(len(mass_LQ), heads, -1).mean(-1).tolist())


SCORER = Scorer(
    name="attention-mass",
    source="arXiv:2310.01801 (FastGen), arXiv:2407.02490 (MInference)",
    score=score_heads,
)
