"""`causal-head-gating`: gates pushed open and pushed closed.

Nam et al. 2025, "Causal Head Gating" (arXiv 2505.13737): gates are fitted to the negative
log-likelihood without penalty, and from there twice more: with a penalty that favours open gates
(G+) and with one that favours closed gates (G-). A head that stays open under pressure to close
facilitates the task (both high); one that closes under pressure to open interferes (both low);
what follows the pressure is irrelevant. The mean of G+ and G- is therefore one order: interfering
below irrelevant below facilitating.

Differences to the paper: one gate per KV head instead of per query head; a closed gate means
local attention instead of no output; the text is the model's own correct answers; the penalty is
on the gates, not on their logits; G+ and G- are means over their training.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlkv_vllm.hf.answer_loss import Batch, answer_loss
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.options import Positive
from rlkv_vllm.scorers.optimise import GateTraining, optimise_gates
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, Weight


class Settings(GateTraining):
    """Of each of the three trainings."""

    steps: Positive = 40
    reg: Weight = 0.2


def score_heads(given: ScoringInput) -> Gates:
    """Mean of G+ and G-."""
    options: Settings = given.settings
    fitted: list[Gates] = []
    with attach_gates(given.model, given.sink, given.window) as gates:

        def fit(start: Gates, sign: float) -> None:
            """Train from `start` with the penalty times `sign`."""
            before = len(fitted) * options.steps

            def loss(batch: Batch) -> torch.Tensor:
                return answer_loss(given.model, batch) + sign * options.reg * gates.mean()

            def report(done: int, total: int, state: str) -> None:
                given.report(before + done, 3 * total, state)

            gates.set_soft(start)
            fitted.append(optimise_gates(gates, replace(given, report=report), loss))

        fit([[0.5] * gates.num_kv_heads for _ in gates.gates], 0.0)
        start = gates.values()
        fit(start, -1.0)
        fit(start, 1.0)
    means: Gates = np.mean(fitted[1:], axis=0).tolist()
    return means


SCORER = Scorer(
    "causal-head-gating", "arXiv:2505.13737 (causal head gating)", score_heads, Settings
)
