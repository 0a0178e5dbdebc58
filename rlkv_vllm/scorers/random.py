"""`random`: the baseline that every method has to beat."""

from __future__ import annotations

import random

from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput


def score_heads(given: ScoringInput) -> Gates:
    """Uniform random gates of the run's seed."""
    config = given.model.config.get_text_config()
    rng = random.Random(given.seed)
    given.report(1, 1)
    return [
        [rng.random() for _ in range(config.num_key_value_heads)]
        for _ in range(config.num_hidden_layers)
    ]


SCORER = Scorer("random", "none", score_heads)
