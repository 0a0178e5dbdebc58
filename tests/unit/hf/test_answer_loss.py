"""Cross-entropy of answers: batches, the loss, and the loss of really split heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answer_loss import (
    IGNORED,
    Sample,
    SplitLoss,
    answer_loss,
    make_batch,
    micro_batches,
)
from rlkv_vllm.hf.gated_attention import attach_gates
from tests.support import oracle
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS, VOCAB, make_checkpoint

SINK, WINDOW = 2, 5
STREAMING = {(0, 1), (0, 2), (2, 3), (1, 0), (1, 1), (1, 2), (1, 3)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def samples() -> list[Sample]:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, VOCAB, (n,), generator=g).tolist() for n in (30, 44, 21)]
    return [Sample(row[:cut], row[cut:]) for row, cut in zip(rows, (12, 31, 5), strict=True)]


def test_labels_are_on_the_answers() -> None:
    batch = make_batch([Sample([5, 6], [7]), Sample([8], [9, 4, 3])], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 4, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 9, 4, 3]]


@torch.no_grad()
def test_the_loss_counts_the_answers_only_and_no_padding(model: Any) -> None:
    total = tokens = 0.0
    for sample in samples():
        logits = model(torch.tensor([sample.prompt_ids + sample.completion_ids])).logits[0]
        logprobs = torch.log_softmax(logits, -1)
        first = len(sample.prompt_ids) - 1
        total -= sum(logprobs[first + i, t].item() for i, t in enumerate(sample.completion_ids))
        tokens += len(sample.completion_ids)
    batch = make_batch(samples(), model.device)
    assert answer_loss(model, batch).item() == pytest.approx(total / tokens, rel=1e-4)
    with attach_gates(model, SINK, WINDOW) as gates:
        gates.set_soft([[0.3] * NUM_KV_HEADS] * NUM_LAYERS)
        gated = answer_loss(model, batch).item()
        alone = [answer_loss(model, make_batch([s], model.device)).item() for s in samples()]
    assert gated != pytest.approx(total / tokens, rel=1e-3)
    lengths = [len(sample.completion_ids) for sample in samples()]
    weighted = sum(loss * n for loss, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert gated == pytest.approx(weighted, rel=1e-4)


def test_the_loss_of_split_heads_is_the_oracles(checkpoint: Path, model: Any) -> None:
    full = [[j for j in range(NUM_KV_HEADS) if (i, j) not in STREAMING] for i in range(NUM_LAYERS)]
    total = tokens = 0.0
    for sample in samples():
        ids = sample.prompt_ids + sample.completion_ids
        logprobs = oracle.logprobs(checkpoint, ids, full, SINK, WINDOW)
        first = len(sample.prompt_ids) - 1
        total -= sum(logprobs[first + i, t].item() for i, t in enumerate(sample.completion_ids))
        tokens += len(sample.completion_ids)
    with SplitLoss(model, samples(), SINK, WINDOW) as loss:
        assert loss(STREAMING) == pytest.approx(total / tokens, rel=1e-4)
        assert loss(()) < loss(STREAMING) - 0.01 or loss(()) > loss(STREAMING) + 0.01
    assert model.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("batch_tokens", [1, 60, 90, 200])
def test_the_loss_does_not_depend_on_the_batches(model: Any, batch_tokens: int) -> None:
    with SplitLoss(model, samples(), SINK, WINDOW) as together:
        expected = together(STREAMING)
    with SplitLoss(model, samples()[::-1], SINK, WINDOW, batch_tokens=batch_tokens) as loss:
        assert loss(STREAMING) == pytest.approx(expected, rel=1e-6)


def test_long_answers_count_in_full(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with SplitLoss(model, samples(), SINK, WINDOW) as loss:
        expected = loss(STREAMING)
    monkeypatch.setattr("rlkv_vllm.hf.answer_loss._BLOCK", 4)
    with SplitLoss(model, samples(), SINK, WINDOW) as loss:
        assert loss(STREAMING) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_no_number_is_refused(checkpoint: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    refused = pytest.raises(RlkvError, match=r"nan while heads 0\.1 stream: load")
    with SplitLoss(broken, samples(), SINK, WINDOW) as loss, refused:
        loss({(0, 1)})


def test_a_set_is_evaluated_once(model: Any) -> None:
    known: dict[str, float] = {}
    saved: list[int] = []
    with SplitLoss(
        model, samples(), SINK, WINDOW, known=known, save=lambda: saved.append(len(known))
    ) as loss:
        first = loss([(2, 3), (0, 1)])
        assert loss({(0, 1), (2, 3)}) == first
        loss(())
        assert (loss.evaluations, saved) == (2, [1, 2])
        assert loss.tokens == 2 * 3 * 44  # padded to the longest
        assert set(known) == {"0.1 2.3", ""}
        assert loss.heads == [(i, j) for i in range(NUM_LAYERS) for j in range(NUM_KV_HEADS)]
    with SplitLoss(model, samples(), SINK, WINDOW, known=known) as loss:
        assert loss([(0, 1), (2, 3)]) == first
        assert (loss.evaluations, loss.tokens) == (0, 0)


def test_the_model_comes_back_after_an_error(model: Any) -> None:
    with (
        pytest.raises(RlkvError, match="full heads"),
        SplitLoss(model, samples(), SINK, WINDOW) as loss,
    ):
        loss._gates.set_hard([])
    assert model.config._attn_implementation == "sdpa"


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 120),
)
def test_micro_batches_hold_every_sample_once(lengths: list[int], batch_tokens: int) -> None:
    given = [Sample([i], [0] * length) for i, length in enumerate(lengths)]
    groups = micro_batches(given, batch_tokens)
    assert sorted(s.prompt_ids[0] for group in groups for s in group) == [*range(len(lengths))]
    for group in groups:
        assert len(group) == 1 or len(group) * max(map(len, group)) <= batch_tokens
