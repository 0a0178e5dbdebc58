"""The search for full heads on answers that are known exactly."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.streaming import Head, Streaming, full_heads
from rlkv_vllm.search.answers import Answers
from rlkv_vllm.search.config import SearchConfig
from rlkv_vllm.search.losses import Losses
from rlkv_vllm.search.neighbours import Nested, most_evaluations
from rlkv_vllm.search.search import (
    RACES,
    gain_p,
    heads_in_question,
    most_answers,
    nested_of,
    search,
)
from rlkv_vllm.store import Store
from tests.unit.search.planted import (
    DIFFICULTY,
    HEADS,
    NEEDED,
    REDUNDANT,
    PlantedModel,
    as_text,
    planted,
    random_share,
)


def found_by(
    model: PlantedModel,
    folder: Path,
    ranking: Sequence[Head] = HEADS,
    counts: Sequence[int] = (8, 10),
    *,
    margin: int = 20,
    candidates: int = 12,
    problems: int = 256,
) -> Nested:
    store = Store(folder / "answers.json", "test", {})
    model.own = [0]
    return search(
        Answers(model.solve, store, 64),
        Losses(model.cross_entropy, store),
        ranking,
        counts,
        margin=margin,
        candidates=candidates,
        problems=problems,
        level=0.1,
    )


def good_ranking(seed: int) -> list[Head]:
    """A ranking after which every allocation up to half of the heads solves most."""
    rng = random.Random(seed)
    spare = [sorted(pair)[rng.randrange(2)] for pair in REDUNDANT]
    free = [head for head in HEADS if head not in NEEDED.union(*REDUNDANT)]
    first = rng.sample([*free, *spare], len(free) + len(spare))
    rest = [head for head in HEADS if head not in first]
    return [*first, *rng.sample(rest, len(rest))]


@pytest.mark.parametrize("seed", range(4))
def test_what_one_exchange_makes_right_is_found(tmp_path: Path, seed: int) -> None:
    """Two heads that do the same work both stream, or a needed one does."""
    ranking = good_ranking(seed)
    assert planted({*ranking[:10]}) == 0.95
    wrong = random.Random(seed).choice(ranking[10:])
    at = random.Random(seed).randrange(8)
    place = ranking.index(wrong)
    ranking[at], ranking[place] = ranking[place], ranking[at]
    given = nested_of(ranking, (8, 10))
    found = found_by(PlantedModel(), tmp_path, ranking)
    assert [planted({*one}) for one in found] == [0.95, 0.95]
    if planted({*given[0]}) == planted({*given[1]}) == 0.95:
        assert found == given


def test_several_exchanges_are_made_one_after_the_other(tmp_path: Path) -> None:
    ranking = good_ranking(0)
    for at, place in ((0, 12), (3, 15)):
        ranking[at], ranking[place] = ranking[place], ranking[at]
    assert planted({*ranking[:8]}) < 0.7
    found = found_by(PlantedModel(), tmp_path, ranking)
    assert [planted({*one}) for one in found] == [0.95, 0.95]


def test_answers_decide_not_the_cross_entropy(tmp_path: Path) -> None:
    """Where the cross-entropy misleads nothing worse is taken."""
    ranking = good_ranking(1)

    def seems(streaming: set[Head]) -> float:
        return math.exp(-sum(head not in NEEDED for head in streaming))

    model = PlantedModel(seems=seems)
    assert found_by(model, tmp_path, ranking) == nested_of(ranking, (8, 10))
    assert model.asked
    assert max(problem for problem, _ in model.asked) < 64, "those that are worse are out early"


def test_of_equal_ones_the_given_one_stays(tmp_path: Path) -> None:
    ranking = random.Random(1).sample(HEADS, len(HEADS))
    model = PlantedModel(lambda streaming: 0.5)
    assert found_by(model, tmp_path, ranking) == nested_of(ranking, (8, 10))


@settings(max_examples=40, deadline=None)
@given(
    ranking=st.permutations(HEADS),
    counts=st.sets(st.integers(1, 19), min_size=1, max_size=3).map(sorted),
    margin=st.integers(1, 6),
    candidates=st.integers(1, 9),
    problems=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_it_stays_within_margin_and_budget_and_makes_nothing_worse(
    ranking: list[Head], counts: list[int], margin: int, candidates: int, problems: int, seed: int
) -> None:
    share = random_share(seed)
    model = PlantedModel(share)
    options = {"margin": margin, "candidates": candidates, "problems": problems}
    with TemporaryDirectory() as folder:
        found = found_by(model, Path(folder), ranking, counts, **options)
    start = nested_of(ranking, counts)
    for count, one in zip(counts, found, strict=True):
        moved = {*one} ^ {*ranking[:count]}
        assert all(
            any(near - margin <= ranking.index(head) < near + margin for near in counts)
            for head in moved
        )

    def worth(nested: Nested) -> float:
        return fmean(hard < share({*one}) for one in nested for hard in DIFFICULTY[:problems])

    assert worth(found) > worth(start) or found == start
    assert len(model.asked) == len({*model.asked}), "no answer is asked for twice"
    assert len(model.asked) <= most_answers(len(counts), candidates, problems)
    assert len(model.evaluated) == len({*model.evaluated})
    asked = len(heads_in_question(HEADS, counts, margin))
    assert len(model.evaluated) <= RACES * most_evaluations(asked, len(counts), candidates)


def test_the_bound_of_answers_can_be_reached(tmp_path: Path) -> None:
    """One sparsity; every neighbour is better than what it is around, as far as it is asked."""
    rank = {head: place for place, head in enumerate(HEADS)}
    model = PlantedModel(lambda streaming: 0.01 * sum(rank[head] for head in streaming) - 0.2)
    found_by(model, tmp_path, HEADS, [8], candidates=4, problems=64)
    assert len(model.asked) > 0.9 * most_answers(1, 4, 64)


@pytest.mark.parametrize(
    ("heads", "counts", "margin", "moving", "answers", "evaluations"),
    [
        (20, [8, 10], 10, 20, 6_912, 330),
        (288, [144], 10, 20, 3_456, 267),
        (288, [115, 144], 10, 40, 6_912, 510),
    ],
)
def test_cost_is_as_documented(
    heads: int, counts: list[int], margin: int, moving: int, answers: int, evaluations: int
) -> None:
    """The table of docs/find-heads.md: search and test, with the other defaults."""
    config = SearchConfig()
    tested = 2 * len(counts) * config.problems
    ranking = [(0, head) for head in range(heads)]
    assert len(heads_in_question(ranking, counts, margin)) == moving
    assert most_answers(len(counts), config.candidates, config.problems) + tested == answers
    most = RACES * most_evaluations(moving, len(counts), config.candidates)
    assert most == evaluations


def test_what_always_streams_is_under_everything(tmp_path: Path) -> None:
    model = PlantedModel()
    found_by(model, tmp_path, counts=[10], margin=3)
    assert all({*HEADS[:7]} <= {*one} for _, one in model.asked)
    assert not any({*HEADS[13:]} & {*one} for _, one in model.asked)


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("straight", "killed")]
    for folder in folders:
        folder.mkdir()
    ranking = [*sorted(NEEDED), *good_ranking(0)[:14]]
    ranking = [*dict.fromkeys(ranking), *(head for head in HEADS if head not in ranking)]
    model = PlantedModel()
    expected = found_by(model, folders[0], ranking)
    for dies_at in (0, 30, 41, 60):
        with pytest.raises(KeyboardInterrupt):
            found_by(PlantedModel(dies_at=dies_at), folders[1], ranking)
    again = PlantedModel()
    assert found_by(again, folders[1], ranking) == expected
    assert len(again.asked) < len(model.asked)
    straight, killed = ((folder / "answers.json").read_bytes() for folder in folders)
    assert straight == killed
    assert as_text(again) != as_text(model)


def test_a_killed_search_asks_with_the_same_seeds(tmp_path: Path) -> None:
    """Sampled answers depend on the seed of their chunk."""

    def ask(model: PlantedModel, name: str) -> None:
        answers = Answers(model.solve, Store(tmp_path / name, "test", {}), 10, seed=7)
        answers.ask([nested_of(HEADS, [count])[0] for count in range(1, 9)], 5)

    straight, killed, again = PlantedModel(), PlantedModel(dies_at=2), PlantedModel()
    ask(straight, "straight.json")
    assert len({*straight.seeds}) == len(straight.seeds) == 4
    with pytest.raises(KeyboardInterrupt):
        ask(killed, "killed.json")
    ask(again, "killed.json")
    assert killed.seeds + again.seeds == straight.seeds


def test_gains_are_tested_per_problem(tmp_path: Path) -> None:
    """Two allocations of the same problem are one observation."""
    model = PlantedModel(lambda streaming: 0.9 if HEADS[0] in streaming else 0.4)
    answers = Answers(model.solve, Store(tmp_path / "answers.json", "test", {}), 64)
    good, bad = nested_of(HEADS, (1, 2)), nested_of(HEADS[5:], (1, 2))
    answers.ask([*good, *bad], 20)
    differ = sum(0.4 <= hard < 0.9 for hard in DIFFICULTY[:20])
    assert gain_p(answers, good, bad, 0, 20) == pytest.approx(0.5**differ)
    assert gain_p(answers, bad, good, 0, 20) == 1
    assert gain_p(answers, good, bad, 0, 0) == 1


def test_a_process_that_does_not_write_writes_nothing(tmp_path: Path) -> None:
    path, model = tmp_path / "answers.json", PlantedModel()
    model.own = [0]
    store = Store(path, "test", {}, is_writer=False)
    solved = Answers(model.solve, store, 64).ask([()], 100)
    assert solved == {(): fmean(hard < 0.95 for hard in DIFFICULTY[:100])}
    assert Losses(model.cross_entropy, store)(()) == -math.log(0.95)
    assert not path.exists()


def test_a_loss_is_evaluated_once_and_found_again(tmp_path: Path) -> None:
    model, counts = PlantedModel(), []
    model.own = [0]
    wanted: list[Streaming] = [(), (HEADS[0],), (HEADS[0], HEADS[5])]
    for _ in range(2):
        store = Store(tmp_path / "answers.json", "test", {})
        losses = Losses(model.cross_entropy, store, report=counts.append)
        assert [losses(one) for one in wanted * 2] == [-math.log(planted({*x})) for x in wanted * 2]
        assert losses.count == 3
    assert model.evaluated == wanted
    assert counts == [1, 2, 3]


def test_full_heads_are_the_others() -> None:
    assert full_heads(((0, 1), (2, 0), (2, 1)), 3, 2) == [[0], [0, 1], []]
