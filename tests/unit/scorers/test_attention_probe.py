"""Attention weights as scorers see them, against those of transformers' eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.kernels.reference import streaming_mask
from rlkv_vllm.scorers import attention_probe
from rlkv_vllm.scorers.attention_probe import beyond, observe_answers
from rlkv_vllm.scorers.scorer import ScoringInput
from tests.support.checkpoints import ARCHITECTURES, NUM_LAYERS, NUM_Q_HEADS, VOCAB, make_checkpoint
from tests.support.profiles import assert_one_line

SAMPLES = [
    Sample(row[:9], row[9:])
    for row in (
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        for length in (23, 31)
    )
]

pytestmark = pytest.mark.usefixtures("one_thread")


def scoring_input(model: Any) -> ScoringInput:
    return ScoringInput(
        model=model,
        tokenizer=None,
        task=None,
        problems=[],
        samples=SAMPLES,
        sink=2,
        window=5,
        seed=0,
        settings={},
        report=lambda *_: None,
    )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("block", [4, 512])
def test_weights_are_those_of_eager_attention(
    architecture: str, block: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    monkeypatch.setattr(attention_probe, "BLOCK", block)
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def observe(sample: Sample, layer: int, first: int, weights_QTS: torch.Tensor) -> None:
        blocks = seen.setdefault((SAMPLES.index(sample), layer), [])
        assert first == len(sample.prompt_ids) - 1 + sum(b.shape[1] for b in blocks)
        blocks.append(weights_QTS)

    observe_answers(scoring_input(model), observe)
    assert len(seen) == len(SAMPLES) * NUM_LAYERS
    assert model.config._attn_implementation == "sdpa"
    for (i, layer), blocks in seen.items():
        sample = SAMPLES[i]
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            expected = eager(ids, output_attentions=True).attentions[layer][0]
        found = torch.cat(blocks, 1)
        assert found.shape == (NUM_Q_HEADS, len(sample.completion_ids), ids.shape[1])
        torch.testing.assert_close(
            found, expected[:, len(sample.prompt_ids) - 1 : -1], atol=1e-4, rtol=0
        )


def test_beyond_is_what_streaming_heads_miss() -> None:
    position = torch.arange(30)
    causal = position[None] <= position[:, None]
    for sink, window in ((0, 1), (0, 7), (4, 16), (16, 33)):
        seen = streaming_mask(position, position, sink, window)
        assert torch.equal(beyond(position, 30, sink, window), causal & ~seen)
        part = beyond(position[7:12], 30, sink, window)
        assert torch.equal(part, (causal & ~seen)[7:12])


def test_the_model_comes_back_whatever_happens(tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen3", tmp_path)).eval()
    ids = torch.tensor([SAMPLES[0].prompt_ids])
    before = model(ids).logits

    def observe(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        observe_answers(scoring_input(model), observe)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_models_without_gates_are_refused() -> None:
    config = Gemma2Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=VOCAB,
    )  # fmt: skip
    with pytest.raises(RlkvError) as error:
        observe_answers(scoring_input(Gemma2ForCausalLM(config)), lambda *_: None)
    assert_one_line(error.value, "Gemma2")
