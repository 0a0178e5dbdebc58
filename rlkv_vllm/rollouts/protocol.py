"""What a trainer asks of an engine that writes its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlkv_vllm.answers import Answer, Sampling

#: ``[layers][KV heads]``, in [0, 1].
Gates = Sequence[Sequence[float]]


class Rollouts(Protocol):
    """An engine in gated mode."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        """One answer with log-probabilities per prompt, in their order, all with these gates."""
        ...
