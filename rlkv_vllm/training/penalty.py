"""The penalty that pushes gates towards streaming while the model still reasons well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlkv_vllm.training.sharding import whole


def penalty_weight(reward: float, reg: float, tau: float) -> float:
    """What ``mean|gate|`` is multiplied with in the loss (RLKV, arXiv 2510.08525, section 3.3).

    Args:
        reward: mean reward of the batch, over all processes.
        reg: strength.
        tau: reward below which nothing is penalised, so that the policy can recover.

    Returns:
        ``reg * (exp(reward) - 1)`` above `tau`, else 0.
    """
    return reg * math.expm1(reward) if reward > tau else 0.0


def mean_gate(gates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean absolute gate over all layers and KV heads, a scalar that gradients flow through."""
    return torch.cat([whole(gate).reshape(-1) for gate in gates]).abs().mean()
