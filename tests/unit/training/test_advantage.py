from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl")

from rlkv_vllm.training.advantage import batch_advantages
from rlkv_vllm.training.trainer import RlkvConfig, RlkvTrainer

REWARDS = [1.0, 0.0, 1.0, 1.0, 0.25, 1.0]
TOKENS = [10, 400, 30, 5, 100, 20]


def expected(rewards: list[float], tokens: list[int]) -> np.ndarray:
    per_token = np.repeat(np.array(rewards), tokens)
    return (np.array(rewards) - per_token.mean()) / (per_token.std() + 1e-4)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 500)), min_size=2, max_size=12))
def test_an_answer_counts_as_often_as_it_has_tokens(answers: list[tuple[float, int]]) -> None:
    rewards, tokens = [reward for reward, _ in answers], [n for _, n in answers]
    ours = batch_advantages(torch.tensor(rewards), torch.tensor(tokens))
    np.testing.assert_allclose(ours.numpy(), expected(rewards, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_rewards_have_no_advantage(reward: float) -> None:
    ours = batch_advantages(torch.full((5,), reward), torch.tensor([7, 1, 900, 3, 11]))
    assert ours.tolist() == [0.0] * 5


def test_answers_that_the_loss_does_not_see_do_not_count() -> None:
    ours = batch_advantages(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([4, 4, 0]))
    np.testing.assert_allclose(ours[:2].numpy(), expected([0.0, 1.0], [4, 4]), rtol=1e-6)
    assert batch_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).isfinite().all()


@pytest.mark.parametrize("process", [0, 1])
def test_every_process_gets_its_rows_of_the_whole_batch(process: int) -> None:
    local = slice(3 * process, 3 * process + 3)

    def gather(tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.tolist() == TOKENS[local]
        return torch.tensor(TOKENS)

    trainer: Any = SimpleNamespace(
        _rewards=torch.tensor(REWARDS),
        accelerator=SimpleNamespace(process_index=process, gather=gather),
        _logs={"advantages": deque([9.0] + [0.0] * 6)},
    )
    mask = torch.arange(max(TOKENS)) < torch.tensor(TOKENS)[local, None]
    output = {"completion_mask": mask.int(), "advantages": torch.zeros(3)}
    RlkvTrainer._normalise_over_batch(trainer, output)
    whole = expected(REWARDS, TOKENS)
    np.testing.assert_allclose(output["advantages"].numpy(), whole[local], rtol=1e-5)
    assert trainer._logs["advantages"][0] == 9.0
    np.testing.assert_allclose(list(trainer._logs["advantages"])[1:], whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "token"}, "choose from group, batch"),
        ({"advantage": "batch", "scale_rewards": "group"}, "leave out scale_rewards"),
        ({"advantage": "batch", "scale_rewards": False}, "leave out scale_rewards"),
        (
            {"advantage": "batch", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RlkvConfig(use_cpu=True, bf16=False, **options)


def test_rewards_are_scaled_as_trl_does_unless_asked_otherwise() -> None:
    assert RlkvConfig(use_cpu=True, bf16=False).scale_rewards == "group"
    assert RlkvConfig(use_cpu=True, bf16=False, scale_rewards=False).scale_rewards == "none"
