import math

import pytest

from rlkv_vllm.training.penalty import penalty_weight


def test_weight_grows_with_the_reward_and_is_zero_up_to_tau() -> None:
    assert penalty_weight(0.5, 0.02, 0.5) == 0
    assert penalty_weight(0.0, 0.02, 0.5) == 0
    assert penalty_weight(1.0, 0.02, 0.5) == pytest.approx(0.02 * (math.e - 1))
    assert penalty_weight(0.6, 0.02, 0.5) < penalty_weight(0.7, 0.02, 0.5)
