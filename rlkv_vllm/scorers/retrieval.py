"""`retrieval`: how often a head looks straight at the token that is being copied.

Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv
2404.15574): a head scores when, while a token is generated that stands in the needle, its largest
attention weight lies on that token in the needle.

Differences to the paper: the needles are all tokens of the model's own correct answers that stand
earlier in the text, outside sink and window (reasoning models copy facts all the time); a KV head
gets the best score of its query heads.
"""

from __future__ import annotations

import torch

from rlkv_vllm.scorers.attention_probe import beyond, observe_answers
from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput, to_gates


def score_heads(given: ScoringInput) -> Gates:
    """Share of the copied tokens that a head looks at, the best of its query heads."""
    config = given.model.config.get_text_config()
    hits_LQ = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)

    def observe(sample: Sample, layer: int, first: int, weights_QTS: torch.Tensor) -> None:
        ids_S = torch.tensor(sample.prompt_ids + sample.completion_ids, device=weights_QTS.device)
        num_queries, num_keys = weights_QTS.shape[1:]
        queries_T = torch.arange(first, first + num_queries, device=ids_S.device)
        source_TS = ids_S[queries_T + 1, None] == ids_S
        source_TS &= beyond(queries_T, num_keys, given.sink, given.window)
        strongest_QT1 = weights_QTS.argmax(-1, keepdim=True)
        found_QT1 = source_TS.expand(len(weights_QTS), -1, -1).gather(-1, strongest_QT1)
        hits_LQ[layer] += found_QT1.sum((1, 2)).double().cpu()

    observe_answers(given, observe)
    # The number of copied tokens is the same for all heads: the counts are in the same order.
    heads = config.num_key_value_heads
    return to_gates(hits_LQ.reshape(len(hits_LQ), heads, -1).amax(-1).tolist())


SCORER = Scorer(
    name="retrieval",
    source="arXiv:2404.15574 (retrieval heads)",
    score=score_heads,
)
