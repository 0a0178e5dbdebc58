"""`head-importance`: path-integrated gradient of the loss with respect to the gates.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), scores a head
by the derivative of the loss with respect to a mask variable. Here the variable is the gate that
mixes full and local attention, and the loss is the cross-entropy of the model's own correct
answers. The derivative at gates of 1 sees only the first small step towards local attention; it
is therefore averaged over the straight path from all heads streaming to all heads full, as in
integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365).

One difference to integrated gradients: the gradient at each point is first divided by the sum of
its absolute values. The loss changes a hundred times faster where most attention is local, and
without the division those points alone would decide.
"""

from __future__ import annotations

import torch

from rlkv_vllm.hf.answer_loss import answer_loss, make_batch
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.options import Positive, Section
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, to_gates


class Settings(Section):
    """`path_steps` is the number of points of the path; the cost is proportional."""

    path_steps: Positive = 4


def score_heads(given: ScoringInput) -> Gates:
    """Mean over the path of each head's share of the gradient, mapped onto [0, 1]."""
    gradients_PLH = path_gradients(given, given.settings.path_steps)
    sizes_P11 = gradients_PLH.abs().sum((1, 2), keepdim=True)
    shares_PLH = gradients_PLH / sizes_P11.clamp(min=torch.finfo(sizes_P11.dtype).tiny)
    # Opening the gate of a head that needs its cache lowers the loss.
    return to_gates((-shares_PLH.mean(0)).tolist())


def path_gradients(given: ScoringInput, steps: int) -> torch.Tensor:
    """Derivative of the mean loss with respect to every gate, along the path.

    The points are the midpoints of `steps` equal parts of it. One forward and backward pass per
    sample and point. The mean over the points, summed over the heads, is the loss that full
    attention saves (up to the coarseness of the path).

    Returns:
        ``[steps, layers, KV heads]``, float64 on the CPU, in nats per token.
    """
    work = steps * len(given.samples)
    points = []
    with attach_gates(given.model, given.sink, given.window) as gates:
        for step in range(steps):
            mix = (step + 0.5) / steps
            gates.set_soft([[mix] * gates.num_kv_heads for _ in gates.gates])
            for gate in gates.gates:
                gate.grad = None
            for i, sample in enumerate(given.samples, start=1):
                answer_loss(given.model, make_batch([sample], given.model.device)).backward()
                given.report(step * len(given.samples) + i, work)
            found = [gate.grad for gate in gates.gates if gate.grad is not None]
            points.append(torch.stack([g.double().cpu() for g in found]) / len(given.samples))
    return torch.stack(points)


SCORER = Scorer(
    "head-importance",
    "arXiv:1905.10650 (head importance), arXiv:1703.01365 (integrated gradients)",
    score_heads,
    Settings,
)
