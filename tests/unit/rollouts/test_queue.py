"""The queue between trainer and engine."""

import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from queue import Queue
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.rollouts.colocated import ColocatedRollouts, _cache_memory
from rlkv_vllm.rollouts.queue import Gates, RolloutQueue
from rlkv_vllm.training.config import make_config

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


def test_an_engine_that_died_while_the_job_computed_is_named() -> None:
    rollouts = ColocatedRollouts.__new__(ColocatedRollouts)
    rollouts._pipe, theirs = Pipe()
    theirs.close()
    rollouts._process = SimpleNamespace(join=lambda seconds: None, exitcode=-9)  # type: ignore[assignment]
    with pytest.raises(RlkvError, match=r"the process of vLLM ended \(exit status -9"):
        rollouts.generate([[1]], SAMPLING, [[1.0]])


@pytest.mark.parametrize(
    ("model", "options", "share"),
    [
        ("embedded", {}, 0.1),
        ("org/name", {}, 0.25),
        ("org/name", {"kv_cache_memory_bytes": 1 << 30}, None),
        ("org/name", {"gpu_memory_utilization": 0.5}, None),
    ],
)
def test_an_engine_beside_a_trainer_leaves_it_memory(
    model: str, options: dict[str, Any], share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    rollout = {"engine": "vllm-colocate", "options": options}
    config = make_config({"model": model, "output": "runs", "rollout": rollout}, "test")
    chosen = _cache_memory(config)
    if share is None:
        assert chosen == {}
    else:
        total = psutil.virtual_memory().total
        assert 1 << 28 <= chosen["kv_cache_memory_bytes"] <= share * total
