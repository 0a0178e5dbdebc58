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

from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.scorers.attention_probe import head_sums
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, to_gates


def score_heads(given: ScoringInput) -> Gates:
    """Share of the copied tokens that a head looks at, the best of its query heads."""

    def hits(
        sample: Sample, queries_T: torch.Tensor, far_TS: torch.Tensor, weights_QTS: torch.Tensor
    ) -> torch.Tensor:
        ids_S = torch.tensor(sample.prompt_ids + sample.completion_ids, device=weights_QTS.device)
        source_TS = (ids_S[queries_T + 1, None] == ids_S) & far_TS
        strongest_QT1 = weights_QTS.argmax(-1, keepdim=True)
        found_QT1 = source_TS.expand(len(weights_QTS), -1, -1).gather(-1, strongest_QT1)
        return found_QT1.sum((1, 2))

    # The number of copied tokens is the same for all heads: the counts are in the same order.
    return to_gates(head_sums(given, hits).amax(-1).tolist())


SCORER = Scorer("retrieval", "arXiv:2404.15574 (retrieval heads)", score_heads)
