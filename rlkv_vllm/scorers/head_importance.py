"""`head-importance`: path-integrated gradient of the loss with respect to the gates.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), scores a head
by the derivative of the loss with respect to a mask variable. Here the variable is the gate that
mixes full and local attention, and the loss is the cross-entropy of the model's own correct
answers. The derivative at gates of 1 sees only the first small step towards local attention;
it is therefore averaged over the straight path from all heads streaming to all heads full, as in
integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365). The sum of the scores is then
the loss that streaming heads cost, and each score a head's share of it.
"""

from __future__ import annotations

import torch

from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput
from rlkv_vllm.training.gated_attention import attach_gates

#: Points of the path, the midpoints of as many equal steps.
STEPS = 4


def score_heads(given: ScoringInput) -> Gates:
    """One backward pass per sample and path point; see the module's text."""
    model = given.model
    num_samples = len(given.samples)
    with attach_gates(model, given.sink, given.window) as gates:
        shape = [[1.0] * gates.num_kv_heads for _ in gates.gates]
        for step in range(STEPS):
            mix = (step + 0.5) / STEPS
            gates.set_soft([[mix * one for one in row] for row in shape])
            for i, sample in enumerate(given.samples, start=1):
                answer_loss(model, sample).backward()
                given.report(step * num_samples + i, STEPS * num_samples)
        # More gate, less loss: the derivative of a useful head is negative.
        scores_LH = [-gradient_of(gate) / (STEPS * num_samples) for gate in gates.gates]
    return to_gates(scores_LH)
