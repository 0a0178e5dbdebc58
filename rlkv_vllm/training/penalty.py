"""The penalty that pushes gates towards streaming while the model still reasons well."""

from __future__ import annotations

import math


def penalty_weight(reward: float, reg: float, tau: float) -> float:
    """What ``mean|gate|`` is multiplied with in the loss (RLKV, arXiv 2510.08525, section 3.3).

    `reward` is the mean of the batch, over all processes. Below `tau` nothing is penalised, so that
    the policy can recover.
    """
    return reg * math.expm1(reward) if reward > tau else 0.0
