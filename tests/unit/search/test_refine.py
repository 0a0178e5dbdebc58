"""Refinement on answers that are known exactly."""

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.search.answers import Evaluate
from rlkv_vllm.search.config import SearchConfig
from rlkv_vllm.search.refine import refine_gates
from rlkv_vllm.training.run_folder import REFINE_FILE
from tests.support.profiles import assert_one_line

LAYERS, KV_HEADS = 5, 4
#: Heads that the answers need; the others may all stream.
NEEDED = {(0, 1), (1, 2), (3, 3), (4, 0), (2, 2), (2, 3), (0, 0), (1, 1)}
#: The problems that each of them loses when it streams.
LOST = {head: {*random.Random(str(head)).sample(range(400), 60)} for head in NEEDED}
CONFIG = SearchConfig(sparsities=[0.6], problems=100, margin=20, candidates=8)
Gates = list[list[float]]


def streaming_heads(gates: Gates, sparsity: float) -> set[Head]:
    found = allocate(gates, sparsity)
    all_heads = product(range(LAYERS), range(KV_HEADS))
    return {(layer, head) for layer, head in all_heads if head not in found.full[layer]}


def planted(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
    """A problem is solved unless it is one that a streaming head loses."""
    return [
        not any(problem in LOST[head] for head in NEEDED & {*one})
        for problem, one in zip(problems, streaming, strict=True)
    ]


def blind(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
    return [problem % 2 == 0 for problem in problems]


def some_gates(seed: int) -> Gates:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(KV_HEADS)] for _ in range(LAYERS)]


def refined(
    folder: Path,
    gates: Gates,
    evaluate: Evaluate = planted,
    config: SearchConfig = CONFIG,
    num_problems: int = 400,
    seed: int = 0,
) -> Gates:
    path = folder / REFINE_FILE
    return refine_gates(gates, evaluate, num_problems, config, path, seed=seed, chunk=64)[0]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REFINE_FILE).read_text())["result"]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_needed_heads_are_found(tmp_path: Path, seed: int) -> None:
    start = some_gates(seed)
    wide = CONFIG.model_copy(update={"problems": 200, "candidates": 32})
    found = refined(tmp_path, start, config=wide, seed=seed)
    assert not streaming_heads(found, 0.6) & NEEDED
    old, new = streaming_heads(start, 0.6), streaming_heads(found, 0.6)
    assert old & NEEDED
    # The values are the given ones, reassigned.
    assert sorted(chain(*found)) == pytest.approx(sorted(chain(*start)), abs=1e-4)
    (row,) = result(tmp_path)["rows"]
    assert {tuple(head) for head in row["become_full"]} == old - new
    assert {tuple(head) for head in row["become_streaming"]} == new - old
    assert row["found"] == 1 > row["given"]
    assert result(tmp_path)["is_taken"]


def test_other_sparsities_keep_the_order_of_the_gates(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"sparsities": [0.5, 0.6]})
    start = some_gates(3)
    found = refined(tmp_path, start, config=config)

    def order(heads: set[Head]) -> list[list[Head]]:
        return [sorted(heads, key=lambda head: gates[head[0]][head[1]]) for gates in (start, found)]

    lowest, upper = streaming_heads(found, 0.5), streaming_heads(found, 0.6)
    assert lowest < upper
    for heads in (lowest, upper - lowest, {*streaming_heads(found, 1)} - upper):
        given_order, found_order = order(heads)
        assert given_order == found_order
    assert lowest != streaming_heads(start, 0.5)


def test_heads_beyond_the_margin_stay_where_they_are(tmp_path: Path) -> None:
    heads = [(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)]
    needed, free = sorted(NEEDED), [head for head in heads if head not in NEEDED]
    # Places 10 to 13 are in question.
    ranking = [*free[:9], needed[2], needed[0], free[9], free[10], needed[1], free[11], *needed[3:]]
    start = [
        [ranking.index((layer, head)) / 20 for head in range(KV_HEADS)] for layer in range(LAYERS)
    ]
    found = refined(tmp_path, start, config=CONFIG.model_copy(update={"margin": 2}))
    for places in (10, 14):
        assert streaming_heads(found, places / 20) == {*ranking[:places]}
    assert streaming_heads(found, 0.6) == {*ranking[:10], free[9], free[10]}


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.3, 0.3 + 1e-9, 1.0]), min_size=20, max_size=20),
    sparsities=st.lists(st.sampled_from([0.2, 0.4, 0.5, 0.7]), min_size=1, max_size=3),
)
def test_equal_gates_do_not_hide_what_was_found(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], sparsities: list[float]
) -> None:
    """`allocate` of the result gives the chosen heads, whatever ties the gates had."""
    folder = tmp_path_factory.mktemp("refined")
    start = [values[row * KV_HEADS : (row + 1) * KV_HEADS] for row in range(LAYERS)]
    config = CONFIG.model_copy(update={"sparsities": sparsities, "problems": 40})
    found = refined(folder, start, config=config)
    assert all(0 <= gate <= 1 for gate in chain(*found))
    if not result(folder)["is_taken"]:
        assert found == start
        return
    for row in result(folder)["rows"]:
        old = streaming_heads(start, row["sparsity"])
        changed = [
            {tuple(head) for head in row[key]} for key in ("become_full", "become_streaming")
        ]
        assert streaming_heads(found, row["sparsity"]) == (old - changed[0]) | changed[1]


def test_nothing_to_gain_changes_nothing(tmp_path: Path) -> None:
    alike = [[1.0] * KV_HEADS for _ in range(LAYERS)]
    for number, start in enumerate((some_gates(0), alike)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert refined(folder, start, blind, num_problems=7) == start
        assert result(folder)["p"] == 1
        assert not result(folder)["is_taken"]


def test_noise_is_not_followed(tmp_path: Path) -> None:
    """With equally good allocations the level is the share of winners that are taken anyway."""

    def noise(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        rng = random.Random(seed)
        return [rng.random() < 0.5 for _ in problems]

    def taken(level: float) -> int:
        changes = {"problems": 16, "margin": 3, "candidates": 4, "level": level}
        count = 0
        for seed in range(50):
            folder = tmp_path / f"{level}-{seed}"
            folder.mkdir()
            start = some_gates(seed)
            config = CONFIG.model_copy(update=changes)
            count += refined(folder, start, noise, config, seed=seed) != start
        return count

    assert taken(1) > 30
    assert taken(0.1) < 9


def test_a_killed_refinement_gives_the_same(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    expected = refined(straight, some_gates(0))
    for dies_after in (1, 9, 20):
        calls = 0

        def dies(
            problems: Sequence[int],
            streaming: Sequence[Streaming],
            seed: int,
            dies_after: int = dies_after,
        ) -> list[bool]:
            nonlocal calls
            calls += 1
            if calls > dies_after:
                raise KeyboardInterrupt
            return planted(problems, streaming, seed)

        with pytest.raises(KeyboardInterrupt):
            refined(killed, some_gates(0), dies)
    assert refined(killed, some_gates(0)) == expected
    assert (killed / REFINE_FILE).read_bytes() == (straight / REFINE_FILE).read_bytes()

    def never(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        raise AssertionError

    assert refined(killed, some_gates(0), never) == expected, "nothing is asked again"


def test_another_refinement_is_not_continued(tmp_path: Path) -> None:
    refined(tmp_path, some_gates(0))
    others: list[tuple[dict[str, Any], str]] = [
        ({"gates": some_gates(1)}, "start"),
        ({"gates": some_gates(0), "seed": 1}, "seed 0 there, 1 here"),
        (
            {"gates": some_gates(0), "config": CONFIG.model_copy(update={"margin": 3})},
            "search.margin 20 there, 3 here",
        ),
        ({"gates": some_gates(0), "num_problems": 399}, "problems 400 there, 399 here"),
    ]
    for other, words in others:
        with pytest.raises(RlkvError, match="has other settings") as caught:
            refined(tmp_path, **other)
        assert_one_line(caught.value, words, "choose another --output")
    path = tmp_path / REFINE_FILE
    path.write_text('{"made_with": {}, "solved": {}}')  # of a refinement by `rlkv train`
    with pytest.raises(RlkvError, match="is no file of `rlkv refine 1`") as caught:
        refined(tmp_path, some_gates(0))
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("seed", "changes", "answers", "asked_hash", "gates_hash"),
    [
        (0, {}, 2318, "11823fc1008204db", "2109ab49d0ba50f4"),
        (1, {"sparsities": [0.4, 0.6]}, 2770, "d500e1708a8135a6", "8c2423eb161292e9"),
        (2, {"sparsities": [0.5], "margin": 3}, 1198, "b31bb1d13cf77d9a", "679f50e4329f658f"),
    ],
)
def test_the_same_answers_are_asked_for_in_the_same_order(
    tmp_path: Path,
    seed: int,
    changes: dict[str, Any],
    answers: int,
    asked_hash: str,
    gates_hash: str,
) -> None:
    """As by the search of `rlkv train` before `rlkv refine`: its published results hold."""
    asked: list[Any] = []

    def record(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        pairs = zip(problems, streaming, strict=True)
        asked.append([seed, [[problem, [*map(list, one)]] for problem, one in pairs]])
        return planted(problems, streaming, seed)

    config = CONFIG.model_copy(update=changes)
    found = refined(tmp_path, some_gates(seed), record, config, seed=seed)
    assert sum(len(pairs) for _, pairs in asked) == answers
    hashes = [hashlib.sha256(json.dumps(it).encode()).hexdigest()[:16] for it in (asked, found)]
    assert hashes == [asked_hash, gates_hash]


@pytest.mark.parametrize(
    ("num_problems", "searched", "tested"), [(400, 100, 100), (150, 75, 75), (7, 3, 4), (2, 1, 1)]
)
def test_the_winner_is_tested_on_other_problems(
    tmp_path: Path, num_problems: int, searched: int, tested: int
) -> None:
    seen: dict[Streaming, set[int]] = {}

    def record(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        for problem, one in zip(problems, streaming, strict=True):
            seen.setdefault(one, set()).add(problem)
        return [not NEEDED & {*one} for one in streaming]

    refined(tmp_path, some_gates(0), record, num_problems=num_problems)
    sizes = sorted({len(problems) for problems in seen.values()})
    assert sizes[-1] == searched + tested
    assert sizes[-2] == searched if searched > 1 else True
    most = [one for one, problems in seen.items() if len(problems) == searched + tested]
    assert len(most) == 2  # the start and the winner


def test_progress_ends_at_its_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    refine_gates(
        some_gates(0),
        planted,
        400,
        CONFIG,
        tmp_path / REFINE_FILE,
        seed=0,
        chunk=64,
        report=lambda done, total, _: seen.append((done, total)),
    )
    answers = result(tmp_path)["answers"]
    assert [done for done, _ in seen[:-1]] == sorted({done for done, _ in seen})
    assert seen[-1] == (answers, answers)
    (most,) = {total for _, total in seen[:-1]}
    assert answers <= most


@pytest.mark.parametrize(
    ("sparsities", "num_problems", "message"),
    [([0.0, 1.0], 400, "all or none stream"), ([0.5], 1, "2 problems are needed")],
)
def test_nothing_to_choose_is_refused(
    tmp_path: Path, sparsities: list[float], num_problems: int, message: str
) -> None:
    config = CONFIG.model_copy(update={"sparsities": sparsities})
    with pytest.raises(RlkvError, match=message) as caught:
        refined(tmp_path, some_gates(0), config=config, num_problems=num_problems)
    assert_one_line(caught.value)
