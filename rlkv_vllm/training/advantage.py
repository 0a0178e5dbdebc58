"""Advantages normalised over a batch, as the authors of RLKV do; TRL normalises by group."""

from __future__ import annotations

import torch

#: Added to the standard deviation, as in TRL.
_EPSILON = 1e-4


def batch_advantages(rewards: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(reward - mean) / standard deviation, both over the tokens of a batch.

    So an answer counts as often as it has tokens. Equal rewards throughout give exactly 0.

    Args:
        rewards: of all answers of the batch, ``[answers]``.
        tokens: of each answer that the loss sees, ``[answers]``.
    """
    # Float64, and from the lowest reward: no rounding error that the division would enlarge.
    above = rewards.double() - rewards.double().min()
    weights = tokens.double() / tokens.sum().clamp(min=1)
    centred = above - (weights * above).sum()
    deviation = (weights * centred.square()).sum().sqrt()
    return (centred / (deviation + _EPSILON)).to(rewards.dtype)
