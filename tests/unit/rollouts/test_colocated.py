"""The engine beside a trainer, without vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.rollouts import colocated, open_rollouts
from rlkv_vllm.rollouts.config import RolloutConfig

SAMPLING = Sampling(max_tokens=8)
SPAN = Span(4, 16)


def fake_engine(*given: Any) -> tuple[None, Callable[[Any], list[Answer]]]:
    """Answers with what it is asked and where; dies of prompt 13."""
    *_, options, _threads = given

    def answer(question: Any) -> list[Answer]:
        prompts, sampling, gates = question
        if prompts[0] == [13]:
            os.kill(os.getpid(), signal.SIGKILL)
        place = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"], os.getpid() != options["parent"]
        return [Answer(list(prompt), text=f"{sampling} {gates} {place}") for prompt in prompts]

    return None, answer


def test_an_engine_answers_in_a_process_of_its_own_and_its_death_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(colocated, "_set_up", fake_engine)
    config = RolloutConfig(engine="vllm-colocate", options={"parent": os.getpid()})
    with open_rollouts(config, "embedded", None, "auto", SPAN) as rollouts:
        assert rollouts is not None
        first, second = rollouts.generate([[1], [2, 3]], SAMPLING, [[0.5]])
        assert (first.token_ids, second.token_ids) == ([1], [2, 3])
        assert first.text == f"{SAMPLING} [[0.5]] ('0', True)"
        with pytest.raises(RlkvError, match=r"process of vLLM was killed by signal 9.*--resume"):
            rollouts.generate([[13]], SAMPLING, [[1.0]])


def test_an_engine_beside_one_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = RolloutConfig(engine="vllm-colocate")
    with (
        pytest.raises(RlkvError, match="use vllm-server"),
        open_rollouts(config, "embedded", None, "auto", SPAN),
    ):
        pass


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
    chosen = colocated._cache_memory(model, options)
    if share is None:
        assert chosen == {}
    else:
        total = psutil.virtual_memory().total
        assert 1 << 28 <= chosen["kv_cache_memory_bytes"] <= share * total
