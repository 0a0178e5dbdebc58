"""Refinement on answers that are known exactly."""

import json
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.streaming import Head, Streaming
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.search.config import SearchConfig
from rlkv_vllm.search.refine import refine_gates
from rlkv_vllm.training.run_folder import REFINE_FILE
from tests.support.profiles import assert_one_line
from tests.unit.search.planted import HEADS, KV_HEADS, LAYERS, NEEDED, PlantedModel, planted

CONFIG = SearchConfig(sparsities=[0.6], problems=128, margin=20, candidates=8)
Gates = list[list[float]]


def gates_of(ranking: Sequence[Head]) -> Gates:
    """Gates whose order is `ranking`, the first one to stream in front."""
    place = {head: number for number, head in enumerate(ranking)}
    return [[place[layer, head] / 20 for head in range(KV_HEADS)] for layer in range(LAYERS)]


def some_gates(seed: int, wrong: int = 2) -> Gates:
    """Gates of which `wrong` heads stream at 0.6 that had better not."""
    rng = random.Random(seed)
    # Of the pairs that do the same work one head has to stay full, so that 12 may stream.
    free = [head for head in HEADS if head not in NEEDED | {(1, 2), (3, 0)}]
    rest = [head for head in HEADS if head not in free]
    first, rest = rng.sample(free, len(free)), rng.sample(rest, len(rest))
    for place in range(wrong):
        first[place], rest[place] = rest[place], first[place]
    return gates_of([*first, *rest])


def streaming_heads(gates: Gates, sparsity: float) -> set[Head]:
    full = allocate(gates, sparsity).full
    return {(layer, head) for layer, head in HEADS if head not in full[layer]}


def refined(
    folder: Path,
    gates: Gates,
    model: PlantedModel | None = None,
    config: SearchConfig = CONFIG,
    num_problems: int = 400,
    seed: int = 0,
    **options: Any,
) -> Gates:
    path = folder / REFINE_FILE
    model = model or PlantedModel()
    found, _ = refine_gates(
        gates, model, num_problems, config, path, seed=seed, chunk=64, **options
    )
    return found


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REFINE_FILE).read_text())["result"]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_needed_heads_are_found(tmp_path: Path, seed: int) -> None:
    start, model = some_gates(seed), PlantedModel()
    assert planted(streaming_heads(start, 0.6)) < 0.8
    found = refined(tmp_path, start, model, seed=seed)
    assert planted(streaming_heads(found, 0.6)) == 0.95
    old, new = streaming_heads(start, 0.6), streaming_heads(found, 0.6)
    # The values are the given ones, reassigned.
    assert sorted(chain(*found)) == pytest.approx(sorted(chain(*start)), abs=1e-4)
    content = result(tmp_path)
    (row,) = content["rows"]
    assert {tuple(head) for head in row["become_full"]} == old - new
    assert {tuple(head) for head in row["become_streaming"]} == new - old
    assert row["found"] > row["given"] + 0.1
    assert content["is_taken"]
    assert content["answers"] == len(model.asked)
    assert content["evaluations"] == len(model.evaluated)


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
    needed, free = sorted(NEEDED), [head for head in HEADS if head not in NEEDED]
    # Places 10 to 13 are in question.
    ranking = [*free[:9], needed[2], needed[0], free[9], free[10], needed[1], *needed[3:]]
    ranking += [head for head in HEADS if head not in ranking]

    def share(streaming: set[Head]) -> float:
        return 0.95 * 0.8 ** len(streaming & NEEDED)

    config = CONFIG.model_copy(update={"margin": 2})
    found = refined(tmp_path, gates_of(ranking), PlantedModel(share), config)
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
        blind = PlantedModel(lambda streaming: 0.5)
        assert refined(folder, start, blind, num_problems=7) == start
        assert result(folder)["p"] == 1
        assert not result(folder)["is_taken"]


def test_noise_is_not_followed(tmp_path: Path) -> None:
    """With equally good allocations the level is the share of winners that are taken, at most."""

    class Noise(PlantedModel):
        def solve(
            self, problems: Sequence[int], streaming: Sequence[Streaming], seed: int
        ) -> list[bool]:
            rng = random.Random(seed)
            return [rng.random() < 0.5 for _ in problems]

    def taken(level: float) -> int:
        changes = {"problems": 16, "margin": 3, "candidates": 4, "level": level}
        config, count = CONFIG.model_copy(update=changes), 0
        for seed in range(50):
            folder = tmp_path / f"{level}-{seed}"
            folder.mkdir()
            start = some_gates(seed)
            count += refined(folder, start, Noise(), config, seed=seed) != start
        return count

    assert taken(1) > 10
    assert taken(0.1) < 5


def test_a_killed_refinement_gives_the_same(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    expected = refined(straight, some_gates(0))
    for dies_at in (0, 1, 9, 30, 20):
        with pytest.raises(KeyboardInterrupt):
            refined(killed, some_gates(0), PlantedModel(dies_at=dies_at))
    assert refined(killed, some_gates(0)) == expected
    assert (killed / REFINE_FILE).read_bytes() == (straight / REFINE_FILE).read_bytes()
    again = PlantedModel(dies_at=0)
    assert refined(killed, some_gates(0), again) == expected, "nothing is asked again"


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
    path.write_text('{"format": "rlkv refine 1", "settings": {}, "solved": {}}')
    with pytest.raises(RlkvError, match="is no file of `rlkv refine 2`") as caught:
        refined(tmp_path, some_gates(0))
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("num_problems", "searched", "tested"), [(400, 128, 128), (150, 75, 75), (25, 12, 13)]
)
def test_the_winner_is_tested_on_other_problems(
    tmp_path: Path, num_problems: int, searched: int, tested: int
) -> None:
    model = PlantedModel(lambda streaming: 0.4 if streaming & NEEDED else 0.95)
    refined(tmp_path, some_gates(0, wrong=1), model, num_problems=num_problems)
    seen: dict[Streaming, set[int]] = {}
    for problem, one in model.asked:
        seen.setdefault(one, set()).add(problem)
    sizes = sorted(map(len, seen.values()))
    assert sizes[-2:] == [searched + tested] * 2, "the start and the winner"
    assert sizes[-3] <= searched
    chosen_by = set.union(*(problems for problems in seen.values() if len(problems) <= searched))
    assert len(chosen_by) <= searched
    # The cross-entropy is of answers to problems of the choice, too.
    assert len({*model.own}) == min(CONFIG.answers, searched)
    assert len({*model.own} | chosen_by) <= searched


def test_progress_ends_at_its_end(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    refined(
        tmp_path,
        some_gates(0),
        report=lambda stage, done, total, _: seen.append((stage, done, total)),
    )
    answers = result(tmp_path)["answers"]
    for stage, last in (("search", answers), ("cross-entropy", result(tmp_path)["evaluations"])):
        done = [count for name, count, _ in seen[:-1] if name == stage]
        (most,) = {total for name, _, total in seen[:-1] if name == stage}
        assert done == sorted({*done})
        assert done[-1] == last <= most
    assert seen[-1] == ("search", answers, answers)


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
