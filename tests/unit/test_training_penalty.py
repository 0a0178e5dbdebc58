import math

import pytest
import torch

from rlkv_vllm.training.penalty import mean_gate, penalty_weight


def test_weight_grows_with_the_reward_and_is_zero_up_to_tau() -> None:
    assert penalty_weight(0.5, 0.02, 0.5) == 0
    assert penalty_weight(0.0, 0.02, 0.5) == 0
    assert penalty_weight(1.0, 0.02, 0.5) == pytest.approx(0.02 * (math.e - 1))
    assert penalty_weight(0.6, 0.02, 0.5) < penalty_weight(0.7, 0.02, 0.5)


def test_every_gate_gets_the_same_share_of_the_gradient() -> None:
    gates = [torch.ones(4, requires_grad=True), torch.full((4,), 0.5, requires_grad=True)]
    mean = mean_gate(gates)
    mean.backward()
    assert mean.item() == pytest.approx(0.75)
    for gate in gates:
        assert gate.grad is not None
        assert gate.grad.tolist() == [0.125] * 4
