"""The penalty that pushes gates towards streaming while the model still reasons well."""

from __future__ import annotations

import math


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
