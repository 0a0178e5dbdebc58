"""Gates found by gradient descent: what `self-distill`, `duo-attention` and CHG share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answer_loss import Batch, Sample, make_batch
from rlkv_vllm.hf.gated_attention import GatedAttention
from rlkv_vllm.options import Positive, Section
from rlkv_vllm.scorers.scorer import Gates, ScoringInput, Weight


class GateTraining(Section):
    """Settings of a scorer that trains gates; `reg` is the weight of the penalty on their mean."""

    steps: Positive = 100
    learning_rate: Weight = 0.02
    reg: Weight = 0.3
    batch_size: Positive = 8


def optimise_gates(
    gates: GatedAttention, given: ScoringInput, loss: Callable[[Batch], torch.Tensor]
) -> Gates:
    """AdamW without weight decay on the gates alone, clamped to [0, 1] after every step.

    At the end many gates lie at 0 or 1, and an allocation would have to choose among equal ones.
    The mean over all steps has the order of the last gates where those differ clearly, and among
    gates that ended alike it ranks by how long they took.

    Args:
        gates: where they start; soft.
        given: its samples are shuffled anew whenever all were seen; its settings are a
            `GateTraining`.
        loss: of a batch, penalty included.

    Returns:
        Mean of the gates ``[layers][KV heads]`` over all steps; the last ones are in `gates`.

    Raises:
        RlkvError: if a gate becomes NaN.
    """
    settings: GateTraining = given.settings
    samples = list(given.samples)
    optimizer = torch.optim.AdamW(gates.gates, lr=settings.learning_rate, weight_decay=0.0)
    gates.clamp_after(optimizer)
    rng = random.Random(given.seed)
    order: list[Sample] = []
    sums = [torch.zeros_like(gate) for gate in gates.gates]
    for step in range(1, settings.steps + 1):
        if len(order) < min(settings.batch_size, len(samples)):
            order = rng.sample(samples, len(samples))
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        optimizer.zero_grad(set_to_none=True)
        value = loss(make_batch(chosen, gates.model.device))
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for gate, total in zip(gates.gates, sums, strict=True):
                total += gate
        given.report(step, settings.steps, f"loss {value.item():.4g}")
    means = [(total / settings.steps).tolist() for total in sums]
    if any(math.isnan(value) for row in means for value in row):
        raise RlkvError(
            "the gates became NaN: the loss of some text is not finite, try another --seed, or a "
            "model in bfloat16 or float32"
        )
    return means
