"""`duo-attention`: gates trained to keep the outputs of full attention on retrieval text.

Xiao et al. 2024, "DuoAttention" (arXiv 2410.10819): squared distance between the last hidden
states with full attention and with mixed attention, on the tokens that repeat passkeys hidden in
a long text, plus an L1 penalty on the gates.

Differences to the paper: the long text is made of the model's own prompts and answers and the
passkeys of random tokens out of them, so that it exists for any model and vocabulary; the squared
distance is divided by the mean square of the full-attention states and the penalty is the mean
gate, not the sum, so that one strength fits models of any size; the learning rate is constant; a
gate of the profile is the mean over the training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from rlkv_vllm.hf.answer_loss import IGNORED, Batch, Sample
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.options import Positive
from rlkv_vllm.scorers.optimise import GateTraining, optimise_gates
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput, Weight

#: Tokens that a passkey has in front; repeated at the end, they say which one is asked for.
CUE = 2


class Settings(GateTraining):
    """Of the training on `texts`: each has `length` tokens around `passkeys` hidden passkeys."""

    steps: Positive = 80
    reg: Weight = 1.0
    batch_size: Positive = 4
    texts: Positive = 256
    length: Positive = 240
    passkeys: Positive = 6
    passkey_length: Positive = 6


def score_heads(given: ScoringInput) -> Gates:
    """The gates, trained from 1 on output distillation and the penalty."""
    options: Settings = given.settings
    texts = retrieval_texts(given.samples, options, given.seed)
    decoder = given.model.get_decoder()
    with attach_gates(given.model, given.sink, given.window) as gates:
        everything = [range(gates.num_kv_heads)] * len(gates.gates)

        def loss(batch: Batch) -> torch.Tensor:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            wanted = (batch.labels != IGNORED).roll(-1, 1)  # states that predict those tokens
            gates.set_hard(everything)
            with torch.no_grad():
                full = decoder(**inputs, use_cache=False).last_hidden_state[wanted].float()
            gates.set_soft()
            mixed = decoder(**inputs, use_cache=False).last_hidden_state[wanted].float()
            distance = (mixed - full).square().mean() / full.square().mean()
            return distance + options.reg * gates.mean()

        return optimise_gates(gates, replace(given, samples=texts), loss)


def retrieval_texts(samples: Sequence[Sample], options: Settings, seed: int) -> list[Sample]:
    """Long texts, made of `samples`, with passkeys hidden in them and asked for at the end."""
    rng = random.Random(seed)
    pieces = [sample.prompt_ids + sample.completion_ids for sample in samples]
    words = sorted({token for piece in pieces for token in piece})
    texts = []
    for _ in range(options.texts):
        hay: list[int] = []
        while len(hay) < options.length:
            hay += rng.choice(pieces)
        hay = hay[: options.length]
        keys = [
            [rng.choice(words) for _ in range(CUE + options.passkey_length)]
            for _ in range(options.passkeys)
        ]
        places = sorted((rng.randrange(options.length) for _ in keys), reverse=True)
        for place, key in zip(places, keys, strict=True):
            hay[place:place] = key
        asked = [token for key in rng.sample(keys, len(keys)) for token in key]
        texts.append(Sample(hay, asked))
    return texts


SCORER = Scorer("duo-attention", "arXiv:2410.10819 (DuoAttention)", score_heads, Settings)
