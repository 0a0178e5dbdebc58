"""Gates found by gradient descent: what `self-distill`, `duo-attention` and CHG share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import GatedAttention
from rlkv_vllm.options import Positive, Section
from rlkv_vllm.scorers.scorer import Gates, Sample, Weight

IGNORED = -100


class GateTraining(Section):
    """Settings of a scorer that trains gates.

    Attributes:
        steps: optimiser steps.
        learning_rate: constant.
        reg: weight of the penalty on the mean gate.
        batch_size: samples per step.
    """

    steps: Positive = 100
    learning_rate: Weight = 0.02
    reg: Weight = 0.3
    batch_size: Positive = 8


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right.

    Attributes:
        input_ids: ``[samples, tokens]``.
        attention_mask: the same shape, 1 on what is no padding.
        labels: the same shape, `IGNORED` everywhere but on the answers' tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def make_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Put `samples` side by side."""
    rows = [sample.prompt_ids + sample.completion_ids for sample in samples]
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        start = len(sample.prompt_ids)
        labels[i, start : len(row)] = input_ids[i, start : len(row)]
    return Batch(input_ids.to(device), mask.to(device), labels.to(device))


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens, in nats, in float32."""
    first = int((batch.labels != IGNORED).any(0).nonzero()[0])
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=batch.input_ids.shape[1] - first + 1,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch.labels[:, first:].flatten(),
        ignore_index=IGNORED,
    )


def optimise_gates(
    gates: GatedAttention,
    samples: Sequence[Sample],
    loss: Callable[[Batch], torch.Tensor],
    settings: GateTraining,
    seed: int,
    report: Callable[[int], None],
) -> Gates:
    """AdamW without weight decay on the gates alone, clamped to [0, 1] after every step.

    At the end many gates lie at 0 or 1, and an allocation would have to choose among equal ones.
    The mean over all steps has the order of the last gates where those differ clearly, and among
    gates that ended alike it ranks by how long they took.

    Args:
        gates: where they start; soft.
        samples: shuffled anew whenever all were seen.
        loss: of a batch, penalty included.
        settings: steps, learning rate and batch size; the penalty is the loss's.
        seed: of the order of the samples.
        report: called with the number of steps done.

    Returns:
        Mean of the gates ``[layers][KV heads]`` over all steps; the last ones are in `gates`.

    Raises:
        RlkvError: if a gate becomes NaN.
    """
    optimizer = torch.optim.AdamW(gates.gates, lr=settings.learning_rate, weight_decay=0.0)
    gates.clamp_after(optimizer)
    rng = random.Random(seed)
    order: list[Sample] = []
    sums = [torch.zeros_like(gate) for gate in gates.gates]
    for step in range(1, settings.steps + 1):
        if len(order) < min(settings.batch_size, len(samples)):
            order = rng.sample(list(samples), len(samples))
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        optimizer.zero_grad(set_to_none=True)
        loss(make_batch(chosen, gates.model.device)).backward()
        optimizer.step()
        with torch.no_grad():
            for gate, total in zip(gates.gates, sums, strict=True):
                total += gate
        report(step)
    means = [(total / settings.steps).tolist() for total in sums]
    if any(math.isnan(value) for row in means for value in row):
        raise RlkvError(
            "the gates became NaN: the loss of some text is not finite, try another --seed, or a "
            "model in bfloat16 or float32"
        )
    return means
