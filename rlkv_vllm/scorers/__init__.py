"""Scorers: methods that rate how much every KV head needs its full cache. One file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from rlkv_vllm.scorers.scorer import Scorer

#: What `rlkv score --method` takes, with one line for its help. The scorer `some-name` is
#: `SCORER` in `some_name.py`, imported when it is used.
METHODS: dict[str, str] = {
    "greedy": "heads stream one by one, the one first that raises the loss of own answers least",
    "rlkv": "reinforcement learning of gates on the model's own answers (slow)",
    "self-distill": "gates trained on the model's own correct answers, plus a penalty",
    "duo-attention": "gates trained to keep hidden states on retrieval texts, plus a penalty",
    "causal-head-gating": "gates trained on own answers, pushed open and pushed closed",
    "head-importance": "path-integrated gradient of the loss on own correct answers",
    "retrieval": "how often a head looks straight at the token that is being copied",
    "attention-mass": "share of attention beyond sink and window",
    "random": "random gates, the baseline",
}

__all__ = ["METHODS", "get_scorer"]


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        RlkvError: listing the names there are.
    """
    if name not in METHODS:
        raise RlkvError(f"--method {name}: no such scorer: choose from {', '.join(METHODS)}")
    scorer: Scorer = import_module(f"rlkv_vllm.scorers.{name.replace('-', '_')}").SCORER
    return scorer
