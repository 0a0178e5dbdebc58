"""`self-distill`: gates trained by cross-entropy on the model's own correct text.

The cheap ablation of RLKV (arXiv 2510.08525): the same gates, the same data and the same kind of
penalty, but teacher forcing on text that the model wrote with its full cache, in place of
reinforcement learning on text that it writes with the gates. A gate of the profile is the mean over
the training.
"""

from __future__ import annotations

import torch

from rlkv_vllm.hf.answer_loss import Batch, answer_loss
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.scorers.optimise import GateTraining, optimise_gates
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput


def score_heads(given: ScoringInput) -> Gates:
    """The gates, trained from 1 on ``cross-entropy + reg * mean|gate|``."""
    with attach_gates(given.model, given.sink, given.window) as gates:

        def loss(batch: Batch) -> torch.Tensor:
            return answer_loss(given.model, batch) + given.settings.reg * gates.mean()

        return optimise_gates(gates, given, loss)


SCORER = Scorer("self-distill", "ablation of arXiv:2510.08525 (RLKV)", score_heads, GateTraining)
