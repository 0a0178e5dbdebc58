"""Answers of the gated model from elsewhere than `transformers`' generate.

The trainer asks for them through this protocol; engines live in `rlkv_vllm.rollout`, so that
training imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; names and meaning as in vLLM's SamplingParams."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One answer.

    Attributes:
        token_ids: the stop token, if it ended with one, included.
        logprobs: of every token, as sampled: after temperature and the other settings.
        gates_version: of the gates that it was sampled with.
    """

    token_ids: list[int]
    logprobs: list[float]
    gates_version: int


class Rollouts(Protocol):
    """An engine in gated mode."""

    def set_gates(self, gates: Sequence[Sequence[float]]) -> int:
        """Sample with these gates, ``[layers][KV heads]``, from now on; returns their version."""
        ...

    def version(self) -> int:
        """Version of the gates it samples with now."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """One answer per prompt, in their order."""
        ...
