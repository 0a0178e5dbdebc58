"""The queue between trainer and engine."""

import threading
from collections.abc import Sequence
from queue import Queue
from typing import Any

import pytest

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.rollouts.protocol import Gates
from rlkv_vllm.rollouts.queue import RolloutQueue

SAMPLING = Sampling(max_tokens=8, seed=1)


class Engine:
    """Answers a batch once it may, with its gate as the token; fails at prompt 13."""

    def __init__(self) -> None:
        self.may: Queue[None] = Queue()
        self.began: Queue[int] = Queue()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        self.began.put(prompts[0][0])
        self.may.get(timeout=60)
        if prompts[0][0] == 13:
            raise ValueError("unlucky")
        return [Answer([int(gates[0][0])], logprobs=[0.0]) for _ in prompts]


def test_batches_come_in_order_with_the_gates_of_when_they_began() -> None:
    engine = Engine()
    queue = RolloutQueue(engine)
    queue.set_gates([[0.0]], 0)
    for prompt in (7, 8, 13, 9):
        queue.put([[prompt], [prompt]], SAMPLING)
    assert engine.began.get(timeout=60) == 7
    queue.set_gates([[1.0]], 1)
    engine.may.put(None)
    assert engine.began.get(timeout=60) == 8
    queue.set_gates([[2.0]], 2)
    for _ in range(3):
        engine.may.put(None)
    found: list[Any] = [queue.get(), queue.get()]
    assert [(b.prompts[0], b.step, b.answers[1].token_ids) for b in found] == [
        ([7], 0, [0]),
        ([8], 1, [1]),
    ]
    with pytest.raises(ValueError, match="unlucky"):
        queue.get()
    assert queue.get().step == 2
    queue.close()


def test_a_closed_queue_begins_nothing_and_ends_its_thread() -> None:
    engine = Engine()
    before = set(threading.enumerate())
    queue = RolloutQueue(engine)
    (thread,) = set(threading.enumerate()) - before
    queue.set_gates([[0.0]], 0)
    queue.put([[1]], SAMPLING)
    queue.put([[2]], SAMPLING)
    assert engine.began.get(timeout=60) == 1
    queue.close()
    engine.may.put(None)
    thread.join(60)
    assert not thread.is_alive()
    assert engine.began.empty()
