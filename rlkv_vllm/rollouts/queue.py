"""Batches of prompts that are answered while the trainer computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.rollouts.protocol import Gates, Rollouts


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers, and the step whose gates these were sampled with."""

    prompts: Sequence[Sequence[int]]
    answers: list[Answer]
    step: int


class RolloutQueue:
    """Answers batches of prompts in a thread, in the order in which they are put in.

    A batch is sampled with the gates that are the newest when its turn comes. A batch that has to
    be ready when its step begins is put in some steps earlier; its gates are at most that many
    steps old. Nobody else uses `rollouts` meanwhile.
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
        """Sample batches that begin from now on with these gates."""
        self._newest = (step, gates)

    def put(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Ask for an answer per prompt; gates have been set before."""
        self._asked.put((prompts, sampling))

    def get(self) -> Batch:
        """Wait for the oldest batch not taken yet; raises what the engine raised for it."""
        batch = self._done.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Begin no other batch."""
        self._closed = True
        self._asked.put(None)  # wakes the thread

    def _work(self) -> None:
        while (asked := self._asked.get()) and not self._closed:
            assert self._newest is not None
            step, gates = self._newest
            try:
                self._done.put(Batch(asked[0], self._rollouts.generate(*asked, gates), step))
            except BaseException as error:
                self._done.put(error)
