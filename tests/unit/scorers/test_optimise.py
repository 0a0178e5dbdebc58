"""What trained scorers share, the optimiser; and Duo's retrieval texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.scorers.duo_attention import CUE, Settings, retrieval_texts
from rlkv_vllm.scorers.optimise import GateTraining, optimise_gates
from rlkv_vllm.scorers.scorer import ScoringInput
from tests.support.checkpoints import NUM_KV_HEADS, VOCAB, make_checkpoint
from tests.support.profiles import assert_one_line

SINK, WINDOW = 2, 5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def samples() -> list[Sample]:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, VOCAB, (n,), generator=g).tolist() for n in (30, 44, 21)]
    return [Sample(row[:cut], row[cut:]) for row, cut in zip(rows, (12, 31, 5), strict=True)]


def optimise(
    model: Any, loss: Any, steps: int, rate: float = 0.3, batch_size: int = 2, seed: int = 0
) -> Any:
    """Mean gates, last gates, and the batches that were seen."""
    seen: list[list[int]] = []
    done: list[int] = []
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with attach_gates(model, SINK, WINDOW) as gates:

        def recorded(batch: Any) -> torch.Tensor:
            seen.append(batch.input_ids[:, 0].tolist())
            return loss(gates.gates)

        nothing: Any = None
        given = ScoringInput(
            model,
            nothing,
            nothing,
            [],
            samples(),
            SINK,
            WINDOW,
            seed,
            GateTraining(steps=steps, learning_rate=rate, batch_size=batch_size),
            lambda step, total, figures: done.append(step),
        )
        means = optimise_gates(gates, given, recorded)
        last = gates.values()
        assert all(weight.grad is None for weight in model.parameters() if weight.dim() > 1)
    assert done == list(range(1, steps + 1))
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    return means, last, seen


def test_gates_stay_in_their_range_and_means_tell_apart_what_ended_alike(model: Any) -> None:
    def loss(gates: Any) -> torch.Tensor:
        # Down at once, down later, up.
        return gates[0].sum() + (gates[1] - 0.5).square().sum() - gates[2].sum()

    means, last, _ = optimise(model, loss, 8)
    assert last[0] == [0.0] * NUM_KV_HEADS
    assert last[2] == means[2] == [1.0] * NUM_KV_HEADS
    # Adam moves by the learning rate at first: .7, .4, .1, 0, 0, ...
    assert means[0] == pytest.approx([1.2 / 8] * NUM_KV_HEADS, abs=1e-3)
    assert all(0 < gate < 1 for gate in means[1])
    assert means[3] == [1.0] * NUM_KV_HEADS


def test_every_sample_is_seen_before_any_is_seen_again(model: Any) -> None:
    def loss(gates: Any) -> torch.Tensor:
        return gates[0].sum()

    first = {sample.prompt_ids[0] for sample in samples()}
    _, _, seen = optimise(model, loss, 6, batch_size=1)
    assert {row[0] for row in seen[:3]} == {row[0] for row in seen[3:]} == first
    assert optimise(model, loss, 6, batch_size=1)[2] == seen
    orders = {str(optimise(model, loss, 6, batch_size=1, seed=seed)[2]) for seed in range(4)}
    assert len(orders) > 1
    assert [len(row) for row in optimise(model, loss, 3, batch_size=8)[2]] == [3, 3, 3]


def test_gates_that_are_no_numbers_are_refused(model: Any) -> None:
    with pytest.raises(RlkvError) as error:
        optimise(model, lambda gates: gates[0].sum() * float("nan"), 2)
    assert_one_line(error.value, "NaN", "--seed")
    assert model.config._attn_implementation == "sdpa"


# --- texts of duo-attention ------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 90),
    passkeys=st.integers(1, 5),
    size=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_retrieval_texts(length: int, passkeys: int, size: int, seed: int) -> None:
    options = Settings(texts=3, length=length, passkeys=passkeys, passkey_length=size)
    texts = retrieval_texts(samples(), options, seed)
    assert texts == retrieval_texts(samples(), options, seed)
    known = {token for s in samples() for token in s.prompt_ids + s.completion_ids}
    assert len(texts) == 3
    for text in texts:
        assert len(text.prompt_ids) == length + passkeys * (CUE + size)
        assert len(text.completion_ids) == passkeys * (CUE + size)
        assert set(text.prompt_ids + text.completion_ids) <= known
        asked = [
            text.completion_ids[i : i + CUE + size]
            for i in range(0, len(text.completion_ids), CUE + size)
        ]
        assert all(_contains(text.prompt_ids, key) for key in asked)


def _contains(tokens: list[int], key: list[int]) -> bool:
    return any(tokens[i : i + len(key)] == key for i in range(len(tokens) - len(key) + 1))
