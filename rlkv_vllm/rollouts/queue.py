"""Answers of the gated model from elsewhere than `transformers`' generate.

The trainer asks for them through this protocol; engines live in `rlkv_vllm.rollouts`, so that
training imports no vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from rlkv_vllm.answers import Answer, Sampling

Gates = Sequence[Sequence[float]]


class Rollouts(Protocol):
    """An engine in gated mode."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        """One answer per prompt, in their order, all sampled with these gates."""
        ...


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers, and the step whose gates these were sampled with."""

    prompts: Sequence[Sequence[int]]
    answers: list[Answer]
    step: int


class RolloutQueue:
    """Has batches of prompts answered in a thread, in the order they are put in.

    A batch is answered with the gates that are the newest when its turn comes. One that shall be
    ready when its step begins is put in some steps earlier, with so much older gates at worst.

    Args:
        rollouts: the engine; nobody else may use it meanwhile.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._asked: SimpleQueue[tuple[Sequence[Sequence[int]], Sampling] | None] = SimpleQueue()
        self._done: SimpleQueue[Batch | BaseException] = SimpleQueue()
        self._newest: tuple[int, Gates] | None = None
        self._closed = False
        # A daemon: Ctrl-C does not wait for the last answer.
        threading.Thread(target=self._work, name="rollouts", daemon=True).start()

    def set_gates(self, gates: Gates, step: int) -> None:
        """Batches that begin from now on are sampled with these gates."""
        self._newest = (step, gates)

    def put(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Ask for an answer per prompt; gates have been set before."""
        self._asked.put((prompts, sampling))

    def get(self) -> Batch:
        """Wait for the oldest batch that was not taken yet.

        Raises:
            Exception: what the engine raised for it.
        """
        batch = self._done.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Begin no other batch."""
        self._closed = True
        self._asked.put(None)  # wakes the thread

    def _work(self) -> None:
        while True:
            asked = self._asked.get()
            if asked is None or self._closed:
                return
            prompts, sampling = asked
            assert self._newest is not None
            step, gates = self._newest
            try:
                answers = self._rollouts.generate(prompts, sampling, gates)
                self._done.put(Batch(prompts, answers, step))
            except BaseException as error:
                self._done.put(error)
