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

import torch

from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.scorers.optimise import IGNORED, Batch, optimise_gates
from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput

#: Tokens that a passkey has in front; repeated at the end, they say which one is asked for.
CUE = 2


def score_heads(given: ScoringInput) -> Gates:
    """The gates, trained from 1 on output distillation and the penalty."""
    options = given.settings
    texts = retrieval_texts(
        given.samples,
        n=options["texts"],
        length=options["length"],
        passkeys=options["passkeys"],
        passkey_length=options["passkey_length"],
        seed=given.seed,
    )
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
            return distance + options["reg"] * gates.mean()

        return optimise_gates(
            gates,
            texts,
            loss,
            steps=options["steps"],
            learning_rate=options["learning_rate"],
            batch_size=options["batch_size"],
            seed=given.seed,
            report=lambda done: given.report(done, options["steps"]),
        )


def retrieval_texts(
    samples: Sequence[Sample],
    *,
    n: int,
    length: int,
    passkeys: int,
    passkey_length: int,
    seed: int,
) -> list[Sample]:
    """Long texts with passkeys hidden in them and asked for at the end.

    Args:
        samples: what the text is made of.
        n: texts.
        length: tokens of the text around the passkeys.
        passkeys: hidden in each text.
        passkey_length: tokens of a passkey.
        seed: of all choices.
    """
    rng = random.Random(seed)
    pieces = [sample.prompt_ids + sample.completion_ids for sample in samples]
    words = sorted({token for piece in pieces for token in piece})
    texts = []
    for _ in range(n):
        hay: list[int] = []
        while len(hay) < length:
            hay += rng.choice(pieces)
        hay = hay[:length]
        keys = [[rng.choice(words) for _ in range(CUE + passkey_length)] for _ in range(passkeys)]
        for place, key in zip(
            sorted((rng.randrange(length) for _ in keys), reverse=True), keys, strict=True
        ):
            hay[place:place] = key
        asked = [token for key in rng.sample(keys, len(keys)) for token in key]
        texts.append(Sample(hay, asked))
    return texts


SCORER = Scorer(
    name="duo-attention",
    source="arXiv:2410.10819 (DuoAttention)",
    score=score_heads,
    config={
        "steps": 80,
        "learning_rate": 0.02,
        "reg": 1.0,
        "batch_size": 4,
        "texts": 256,
        "length": 240,
        "passkeys": 6,
        "passkey_length": 6,
    },
)
