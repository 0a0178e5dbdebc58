"""Gates found by gradient descent: what `self-distill`, `duo-attention` and CHG share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import GatedAttention
from rlkv_vllm.scorers.scorer import Gates, Sample

IGNORED = -100


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
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
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
        steps: optimiser steps.
        learning_rate: constant.
        batch_size: samples per step.
        seed: of the order of the samples.
        report: called with the number of steps done.

    Returns:
        Mean of the gates ``[layers][KV heads]`` over all steps; the last ones are in `gates`.

    Raises:
        RlkvError: if a gate is no number any more.
    """
    optimizer = torch.optim.AdamW(gates.gates, lr=learning_rate, weight_decay=0.0)
    gates.clamp_after(optimizer)
    rng = random.Random(seed)
    order: list[Sample] = []
    sums = [torch.zeros_like(gate) for gate in gates.gates]
    for step in range(1, steps + 1):
        if len(order) < min(batch_size, len(samples)):
            order = rng.sample(list(samples), len(samples))
        chosen, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad(set_to_none=True)
        loss(make_batch(chosen, gates.model.device)).backward()
        optimizer.step()
        with torch.no_grad():
            for gate, total in zip(gates.gates, sums, strict=True):
                total += gate
        report(step)
    means = [(total / steps).tolist() for total in sums]
    if any(math.isnan(value) for row in means for value in row):
        raise RlkvError(
            "the gates became NaN: the loss of some text is not finite, try another --seed, or a "
            "model in bfloat16 or float32"
        )
    return means
