"""Scorers: methods that say how much every KV head needs its whole cache. One file each."""

from __future__ import annotations

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.scorers.head_importance import HEAD_IMPORTANCE
from rlkv_vllm.scorers.scorer import Gates, Sample, Scorer, ScoringInput

#: By name, as `rlkv score --method` takes them.
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (HEAD_IMPORTANCE,)}

__all__ = ["SCORERS", "Gates", "Sample", "Scorer", "ScoringInput", "get_scorer"]


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        RlkvError: listing the names there are.
    """
    if name not in SCORERS:
        raise RlkvError(f"--method {name}: no such scorer: choose from {', '.join(SCORERS)}")
    return SCORERS[name]
