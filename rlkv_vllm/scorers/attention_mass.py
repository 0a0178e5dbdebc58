"""`attention-mass`: how much attention lies on tokens that a streaming head drops.

The obvious measure (used for static head or layer budgets, e.g. MInference, arXiv 2407.02490, and
FastGen, arXiv 2310.01801): share of a head's attention on keys outside sink and window, mean over
the tokens of the answers and over the query heads of a KV head.
"""

from __future__ import annotations

import torch

from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.scorers.attention_probe import head_sums
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, to_gates


def score_heads(given: ScoringInput) -> Gates:
    """Mean attention mass beyond sink and window per KV head, mapped onto [0, 1]."""

    def mass(
        sample: Sample, queries_T: torch.Tensor, far_TS: torch.Tensor, weights_QTS: torch.Tensor
    ) -> torch.Tensor:
        return (weights_QTS * far_TS).sum((1, 2)) / len(sample.completion_ids)

    return to_gates(head_sums(given, mass).mean(-1).tolist())


SCORER = Scorer(
    "attention-mass", "arXiv:2310.01801 (FastGen), arXiv:2407.02490 (MInference)", score_heads
)
