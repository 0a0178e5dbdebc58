"""Every scorer on a model in which one head is known to do all the work.

The model continues a text by content alone: the token after v is v + 1, and the only part of it
that is not zero is one query head that looks for v + 1 in the text and copies it. Its texts repeat
after as many tokens as the vocabulary has, so that a streaming head cannot see what to copy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.scorers import METHODS, get_scorer
from rlkv_vllm.scorers.scorer import ScoringInput

VOCAB, HEAD_DIM = 16, 64
LAYERS, KV_HEADS, GROUP = 2, 3, 2
#: Layer, KV head, query head. Not the first of anything: ties go to those.
LAYER, HEAD, QUERY_HEAD = 1, 1, 3
SINK, WINDOW = 2, 5

SETTINGS: dict[str, dict[str, Any]] = {
    "self-distill": {"steps": 40, "learning_rate": 0.05},
    "duo-attention": {"steps": 20, "learning_rate": 0.05, "texts": 8, "length": 60},
    "causal-head-gating": {"steps": 15, "learning_rate": 0.05},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=3 * VOCAB,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        # Rotations so slow that they do not reach the dimensions used below.
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    found = LlamaForCausalLM(config).float().eval()
    one_hot = torch.eye(VOCAB)
    slots = slice(HEAD_DIM // 4, HEAD_DIM // 4 + VOCAB)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.dim() == 2:
                weight.zero_()
        found.model.embed_tokens.weight[:, :VOCAB] = one_hot
        attention = found.model.layers[LAYER].self_attn
        # The head reads v and asks for v + 1, offers what it reads, and writes what it finds.
        asks = one_hot.roll(1, 0) * 10
        attention.q_proj.weight.view(KV_HEADS * GROUP, HEAD_DIM, -1)[QUERY_HEAD, slots, :VOCAB] = (
            asks
        )
        attention.k_proj.weight.view(KV_HEADS, HEAD_DIM, -1)[HEAD, slots, :VOCAB] = one_hot
        attention.v_proj.weight.view(KV_HEADS, HEAD_DIM, -1)[HEAD, :VOCAB, :VOCAB] = one_hot
        output = attention.o_proj.weight.view(-1, KV_HEADS * GROUP, HEAD_DIM)
        output[VOCAB : 2 * VOCAB, QUERY_HEAD, :VOCAB] = one_hot * 4
        found.lm_head.weight[:, VOCAB : 2 * VOCAB] = one_hot * 4
    return found


def samples() -> list[Sample]:
    rows = [[(start + i) % VOCAB for i in range(length)] for start, length in ((0, 50), (5, 61))]
    return [Sample(row[:20], row[20:]) for row in rows]


def accuracy(model: Any, full_heads: list[list[int]] | None) -> float:
    right = total = 0
    for sample in samples():
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with attach_gates(model, SINK, WINDOW) as gates, torch.no_grad():
            if full_heads is not None:
                gates.set_hard(full_heads)
            said = model(ids).logits[0, :-1].argmax(-1)
        first = len(sample.prompt_ids) - 1
        right += int((said[first:] == ids[0, first + 1 :]).sum())
        total += len(sample.completion_ids)
    return right / total


def test_the_model_needs_that_head_and_no_other(model: Any) -> None:
    assert accuracy(model, None) == 1
    assert accuracy(model, [[], [HEAD]]) == 1
    others = [[*range(KV_HEADS)], [head for head in range(KV_HEADS) if head != HEAD]]
    assert accuracy(model, others) < 0.2


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rlkv", "random"}))
def test_the_planted_head_comes_first(name: str, model: Any) -> None:
    scorer = get_scorer(name)
    found = samples()
    gates = scorer.score(
        ScoringInput(
            model=model,
            tokenizer=None,
            task=None,
            problems=[],
            samples=found,
            sink=SINK,
            window=WINDOW,
            seed=0,
            settings=scorer.settings(SETTINGS.get(name)),
            report=lambda *_: None,
        )
    )
    ranked = sorted(
        ((gate, layer, head) for layer, row in enumerate(gates) for head, gate in enumerate(row)),
        reverse=True,
    )
    assert ranked[0][1:] == (LAYER, HEAD)
    assert ranked[0][0] > ranked[1][0] + 0.1
