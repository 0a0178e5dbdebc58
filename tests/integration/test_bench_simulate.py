"""The cluster plan against vLLM's own scheduler, without a model."""

from __future__ import annotations

import pytest

from rlkv_vllm.allocation.forecast import CacheGeometry, forecast_split
from rlkv_vllm.bench.simulate import make_scheduler, simulate
from rlkv_vllm.planning.fleet import (
    GPUS,
    Lengths,
    Replica,
    pair_lengths,
    read_lengths,
    replicas_of,
    sustained,
)
from rlkv_vllm.planning.roofline import ModelSize
from tests.support.profiles import random_gates

MODEL = ModelSize(28, 2048, 6144, 16, 8, 128, vocab=32000)
GATES = random_gates(28, 8)


def replica(name: str, sparsity: float, memory: float, seqs: int, tp: int = 1) -> Replica:
    forecasts = {
        size: forecast_split(
            GATES, sparsity, CacheGeometry(28, 8, 128, size, 16, 16, 64), tp_size=tp
        )
        for size in (2, 1)
    }
    found = replicas_of(
        MODEL,
        GPUS["H100-80GB"],
        forecasts,
        tp_size=tp,
        memory_bytes=int(memory * 2**30),
        max_num_seqs=seqs,
        split_fp8_note="",
    )
    return next(each for each in found if each.name == name)


def lengths(prompts: str, outputs: str) -> Lengths:
    return pair_lengths(
        read_lengths("--prompt-tokens", prompts), read_lengths("--output-tokens", outputs), 4096
    )


@pytest.mark.parametrize(
    ("one", "of", "requests"),
    [
        # Long prompts, long outputs (many preemptions), a limit other than memory, ranks.
        (replica("full cache", 0.5, 1.0, 256), lengths("600-800", "50-150"), 100),
        (replica("split", 0.5, 1.0, 256), lengths("600-800", "50-150"), 150),
        (replica("full cache", 0.5, 0.25, 256), lengths("64", "200-600"), 60),
        (replica("split", 0.5, 0.25, 256), lengths("64", "200-600"), 80),
        (replica("split", 0.8, 0.5, 256), lengths("200-600", "200-400"), 100),
        (replica("full cache + FP8", 0.5, 0.25, 256), lengths("64-256", "200~500"), 100),
        (replica("split", 0.5, 1.0, 12), lengths("64", "100-300"), 60),
        (replica("split", 0.5, 0.25, 256, tp=2), lengths("100-300", "100-200"), 150),
    ],
    ids=lambda value: value.name if isinstance(value, Replica) else "",
)
def test_plan_and_scheduler_agree(one: Replica, of: Lengths, requests: int) -> None:
    plan, found = sustained(one, of), simulate(one, of, requests=requests)
    assert plan.tokens_per_s == pytest.approx(found.tokens_per_s, rel=0.1)
    assert plan.running == pytest.approx(found.running, rel=0.1)
    assert plan.step_seconds == pytest.approx(found.step_seconds, rel=0.1)


def test_a_replica_holds_what_is_planned_and_not_much_more() -> None:
    one, of = replica("split", 0.5, 0.25, 256), lengths("64", "100-300")
    rate = sustained(one, of).requests_per_s
    calm = simulate(one, of, requests_per_s=0.8 * rate, requests=200)
    flooded = simulate(one, of, requests_per_s=1.3 * rate, requests=200)
    assert calm.requests_per_s == pytest.approx(0.8 * rate, rel=0.25)
    assert calm.waiting <= 4
    assert flooded.waiting > 15
    assert flooded.ttft_seconds > 4 * calm.ttft_seconds


def test_the_split_has_its_ring_managers() -> None:
    from rlkv_vllm.engine.cache.ring_manager import RingManager

    one = replica("split", 0.5, 0.25, 256)
    managers = make_scheduler(one, 4096).kv_cache_manager.coordinator.single_type_managers
    rings = sum(isinstance(manager, RingManager) for manager in managers)
    assert rings == one.forecast.groups.num_ring_groups > 0
    assert len(managers) == rings + 1
