"""`head-importance`: path-integrated gradient of the loss with respect to the gates.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), scores a head
by the derivative of the loss with respect to a mask variable. Here the variable is the gate that
mixes full and local attention, and the loss is the cross-entropy of the model's own correct
answers. The derivative at gates of 1 sees only the first small step towards local attention;
it is therefore averaged over the straight path from all heads streaming to all heads full, as in
integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365). The scores sum to the loss that
streaming heads cost (up to the coarseness of the path), and each is its head's share.
"""

from __future__ import annotations

import torch

from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput
from rlkv_vllm.training.gated_attention import attach_gates

#: Points of the path: the midpoints of as many equal steps.
STEPS = 4


def score_heads(given: ScoringInput) -> Gates:
    """The scores of `loss_shares`, mapped onto [0, 1]."""
    return to_gates(loss_shares(given))


def loss_shares(given: ScoringInput, steps: int = STEPS) -> Gates:
    """What each head adds to the loss by becoming a streaming head, in nats per token.

    One forward and backward pass per sample and point of the path. Negative for a head that
    does better without the far past.

    Returns:
        ``[layers][KV heads]``.
    """
    work = steps * len(given.samples)
    with attach_gates(given.model, given.sink, given.window) as gates:
        for step in range(steps):
            mix = (step + 0.5) / steps
            gates.set_soft([[mix] * gates.num_kv_heads for _ in gates.gates])
            for i, sample in enumerate(given.samples, start=1):
                answer_loss(given.model, sample).backward()
                given.report(step * len(given.samples) + i, work)
        gradients = [gate.grad for gate in gates.gates]
    # Opening the gate of a head that needs its cache lowers the loss.
    return [(-gradient / work).tolist() for gradient in gradients if gradient is not None]


def answer_loss(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Mean cross-entropy of the answer's tokens, in nats, in float32."""
    device = next(model.parameters()).device
    length = len(sample.completion_ids)
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids], device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=length + 1).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, -length:])


def to_gates(scores_LH: Gates) -> Gates:
    """Scores mapped linearly onto [0, 1]: the lowest becomes 0, the highest 1.

    The order, all that an allocation looks at, stays. Equal scores throughout become 1.
    """
    flat = [score for row in scores_LH for score in row]
    low, span = min(flat), max(flat) - min(flat)
    if span == 0:
        return [[1.0 for _ in row] for row in scores_LH]
    return [[min(1.0, max(0.0, (score - low) / span)) for score in row] for row in scores_LH]


HEAD_IMPORTANCE = Scorer(
    name="head-importance",
    summary="path-integrated gradient of the loss on the model's own correct answers",
    source="arXiv:1905.10650 (head importance), arXiv:1703.01365 (integrated gradients)",
    config={"path_steps": STEPS},
    score=score_heads,
)
