"""Refinement on rewards that are known exactly."""

import json
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.training.config import RefineConfig
from rlkv_vllm.training.refine import REFINE_LOG_FILE, Allocation, refine_gates
from tests.profiles import assert_one_line

LAYERS, KV_HEADS = 5, 4
#: Heads that the reward needs; the others may all stream.
NEEDED = {(0, 1), (1, 2), (3, 3), (4, 0), (2, 2), (2, 3), (0, 0), (1, 1)}
#: How easily each problem is lost.
DIFFICULTY = [random.Random(problem).random() for problem in range(400)]
CONFIG = RefineConfig(rounds=5, sparsities=[0.6], problems=100, reach=20)


def full_heads(full: Allocation) -> set[tuple[int, int]]:
    return {(layer, head) for layer, heads in enumerate(full) for head in heads}


def planted(problems: Sequence[int], allocations: Sequence[Allocation], seed: int) -> list[float]:
    """A problem is solved unless its difficulty exceeds the share of needed heads that are full."""
    rewards = []
    for problem, full in zip(problems, allocations, strict=True):
        lost = NEEDED - full_heads(full)
        rewards.append(float(DIFFICULTY[problem] < 1 - len(lost) / len(NEEDED)))
    return rewards


def gates(seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(KV_HEADS)] for _ in range(LAYERS)]


def log_rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / REFINE_LOG_FILE).read_text().splitlines()]


def refined(folder: Path, config: RefineConfig = CONFIG, seed: int = 0) -> list[list[float]]:
    return refine_gates(gates(seed), planted, 400, config, folder / REFINE_LOG_FILE, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_needed_heads_are_found(tmp_path: Path, seed: int) -> None:
    found = refined(tmp_path, seed=seed)
    full = allocate(found, 0.6).full
    assert full_heads(full) == NEEDED
    assert full_heads(allocate(gates(seed), 0.6).full) != NEEDED
    # The values are the given ones, dealt out anew.
    assert sorted(chain(*found)) == sorted(chain(*gates(seed)))


def test_sparsities_share_one_order(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"sparsities": [0.5, 0.6]})
    found = refined(tmp_path, config)
    for sparsity in (0.5, 0.6):
        full = allocate(found, sparsity).full
        assert not NEEDED - full_heads(full)


def test_nothing_to_gain_changes_nothing(tmp_path: Path) -> None:
    def blind(problems: Sequence[int], allocations: Sequence[Allocation], seed: int) -> list[float]:
        return [float(problem % 2) for problem in problems]

    log = tmp_path / REFINE_LOG_FILE
    assert refine_gates(gates(0), blind, 7, CONFIG, log, seed=0) == gates(0)
    assert len(log_rows(tmp_path)) == 2  # the start and one round


def test_noise_is_not_followed(tmp_path: Path) -> None:
    """With equally good allocations the level is the share of exchanges that are made anyway."""

    def noise(problems: Sequence[int], allocations: Sequence[Allocation], seed: int) -> list[float]:
        rng = random.Random(seed)
        return [float(rng.random() < 0.5) for _ in problems]

    def exchanges(level: float) -> int:
        config = RefineConfig(rounds=1, sparsities=[0.6], problems=10, level=level)
        changed = 0
        for seed in range(50):
            log = tmp_path / f"{level}-{seed}.jsonl"
            changed += refine_gates(gates(seed), noise, 400, config, log, seed=seed) != gates(seed)
        return changed

    assert exchanges(1) > 30
    assert exchanges(0.1) < 9


def test_equal_gates_keep_the_allocation_they_have(tmp_path: Path) -> None:
    """The start is what `allocate` makes of the gates, ties included."""
    alike = [[1.0] * KV_HEADS for _ in range(LAYERS)]
    seen: list[Allocation] = []

    def record(
        problems: Sequence[int], allocations: Sequence[Allocation], seed: int
    ) -> list[float]:
        seen.extend(allocations)
        return [1.0] * len(problems)

    refine_gates(alike, record, 9, CONFIG, tmp_path / REFINE_LOG_FILE, seed=0)
    assert allocate(alike, 0.6).full in seen


def test_a_killed_refinement_goes_on_with_the_same_rounds(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = refined(whole)
    calls = 0

    def dies(problems: Sequence[int], allocations: Sequence[Allocation], seed: int) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 3:  # in the middle of the second round
            raise KeyboardInterrupt
        return planted(problems, allocations, seed)

    log = killed / REFINE_LOG_FILE
    with pytest.raises(KeyboardInterrupt):
        refine_gates(gates(0), dies, 400, CONFIG, log, seed=0)
    log.write_text(log.read_text() + '{"step": 2, "rew')  # cut off by a kill
    assert refined(killed) == expected

    def figures(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if k != "elapsed"} for row in log_rows(folder)]

    assert figures(killed) == figures(whole)
    assert [row["step"] for row in log_rows(whole)] == list(range(len(log_rows(whole))))
    assert len(log_rows(whole)) > 2


def test_more_rounds_go_on_where_fewer_ended(tmp_path: Path) -> None:
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    fewer.mkdir()
    more.mkdir()
    refined(fewer, CONFIG.model_copy(update={"rounds": 2}))
    assert len(log_rows(fewer)) == 3
    assert refined(fewer) == refined(more)


def test_another_refinement_is_not_continued(tmp_path: Path) -> None:
    refined(tmp_path)
    with pytest.raises(RlkvError, match="made with other settings") as caught:
        refined(tmp_path, CONFIG.model_copy(update={"reach": 3}))
    assert_one_line(caught.value)
