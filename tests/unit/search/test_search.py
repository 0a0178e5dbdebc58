"""The search for full heads on answers that are known exactly."""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain, combinations, pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.streaming import Head, Streaming, full_heads
from rlkv_vllm.search.answers import Answers
from rlkv_vllm.search.config import SearchConfig
from rlkv_vllm.search.search import (
    Found,
    heads_in_question,
    most_answers,
    nested_of,
    search,
)
from rlkv_vllm.store import Store

HEADS = [(layer, head) for layer in range(5) for head in range(4)]
NEEDED = {(0, 0), (0, 3), (1, 1), (2, 0), (3, 1), (4, 2)}
#: Two heads each that do the same work: one of them has to stay full.
REDUNDANT = [{(1, 2), (2, 3)}, {(3, 0), (4, 3)}]
#: A problem is solved if this is below the share that an allocation solves.
DIFFICULTY = [random.Random(problem).random() for problem in range(512)]
Share = Callable[[set[Head]], float]


def planted(streaming: set[Head]) -> float:
    """All or little: only all these pairs apart make a difference."""
    return 0.2 if streaming & NEEDED or any(streaming >= pair for pair in REDUNDANT) else 0.95


class Model:
    """Answers by a share, and may be killed."""

    def __init__(self, share: Share = planted, dies_after: int = 10**9) -> None:
        self.asked: list[tuple[int, Streaming]] = []
        self._share, self._dies_after = share, dies_after

    def __call__(
        self, problems: Sequence[int], streaming: Sequence[Streaming], seed: int
    ) -> list[bool]:
        if len(self.asked) + len(problems) > self._dies_after:
            raise KeyboardInterrupt
        self.asked += zip(problems, streaming, strict=True)
        return [
            DIFFICULTY[problem] < self._share({*one})
            for problem, one in zip(problems, streaming, strict=True)
        ]


def found_by(
    model: Model,
    folder: Path,
    ranking: Sequence[Head] = HEADS,
    counts: Sequence[int] = (8, 10),
    *,
    margin: int = 20,
    candidates: int = 16,
    problems: int = 256,
) -> Found:
    return search(
        Answers(model, Store(folder / "answers.json", "test", {}), 64),
        ranking,
        counts,
        margin=margin,
        candidates=candidates,
        problems=problems,
        known=[nested_of(ranking, counts)],
    )


def exchanged(streaming: Iterable[Head], heads: Sequence[Head]) -> list[set[Head]]:
    """All that differ by an exchange of two heads."""
    out = {*streaming}
    return [out - {a} | {b} for a in out for b in heads if b not in out]


def test_heads_are_found_that_no_single_exchange_leads_to(tmp_path: Path) -> None:
    both = sorted(chain(*REDUNDANT))
    rest = [head for head in HEADS if head not in NEEDED and head not in both]
    ranking = [*both, *rest, *sorted(NEEDED)]
    for count in (8, 10):
        near = exchanged(ranking[:count], HEADS)
        assert {planted(one) for one in near} == {planted({*ranking[:count]})} == {0.2}
    found = found_by(Model(), tmp_path, ranking)
    assert [planted({*one}) for one in found.best] == [0.95, 0.95]
    assert {*found.needed} == NEEDED
    assert [*found.finalists.values()] == sorted(found.finalists.values(), reverse=True)


def test_a_needed_head_streams_where_too_few_others_may(tmp_path: Path) -> None:
    cost = {head: 0.15 + 0.02 * place for place, head in enumerate(sorted(NEEDED))}

    def share(streaming: set[Head]) -> float:
        return 0.95 - sum(cost.get(head, 0) for head in streaming)

    found = found_by(Model(share), tmp_path, counts=[15])
    (best,) = found.best
    assert {*best} & NEEDED == {min(NEEDED)}


@pytest.mark.parametrize("seed", range(6))
def test_no_nested_allocations_are_better(tmp_path: Path, seed: int) -> None:
    """Random costs of heads and of pairs, all nested allocations tried."""
    heads = HEADS[:9]
    rng = random.Random(seed)
    alone = {head: rng.choice([0, 0, 0.01, 0.03, 0.3]) for head in heads}
    shared = {pair: rng.choice([0, 0, 0, 0.2]) for pair in combinations(heads, 2)}

    def share(streaming: set[Head]) -> float:
        cost = sum(alone[head] for head in streaming)
        return 1 - cost - sum(shared[pair] for pair in combinations(sorted(streaming), 2))

    @cache
    def solved(streaming: Streaming) -> float:
        return fmean(hard < share({*streaming}) for hard in DIFFICULTY[:256])

    def worth(allocations: Iterable[Streaming]) -> float:
        return fmean(map(solved, allocations))

    best = max(
        worth([less, more]) for more in combinations(heads, 5) for less in combinations(more, 3)
    )
    found = found_by(Model(share), tmp_path, heads, [3, 5])
    assert worth(found.best) == found.finalists[found.best]
    assert worth(found.best) >= best - 0.02


@settings(max_examples=25, deadline=None)
@given(
    ranking=st.permutations(HEADS),
    counts=st.sets(st.integers(1, 19), min_size=1, max_size=3).map(sorted),
    margin=st.integers(1, 6),
    candidates=st.integers(1, 8),
    problems=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_allocations_are_nested_within_margin_and_within_budget(
    ranking: list[Head], counts: list[int], margin: int, candidates: int, problems: int, seed: int
) -> None:
    cost = {head: random.Random(f"{seed} {head}").random() / 8 for head in HEADS}
    model = Model(lambda streaming: 1 - sum(cost[head] for head in streaming))
    with TemporaryDirectory() as folder:
        found = found_by(
            model,
            Path(folder),
            ranking,
            counts,
            margin=margin,
            candidates=candidates,
            problems=problems,
        )
    assert nested_of(ranking, counts) in found.finalists
    for nested in found.finalists:
        assert [len(one) for one in nested] == counts
        assert all({*less} < {*more} for less, more in pairwise(nested))
        for count, one in zip(counts, nested, strict=True):
            moved = {*one} ^ {*ranking[:count]}
            assert all(
                any(near - margin <= ranking.index(head) < near + margin for near in counts)
                for head in moved
            )
    assert len(model.asked) == len({*model.asked}), "no answer is asked for twice"
    asked = len(heads_in_question(HEADS, counts, margin))
    assert len(model.asked) <= most_answers(asked, len(counts), candidates, problems)


@pytest.mark.parametrize(
    ("heads", "counts", "margin", "asked", "most"),
    [
        (20, [8, 10], 10, 20, 27_968),
        (288, [144], 10, 20, 15_840),
        (288, [115, 144], 10, 40, 38_048),
        (288, [115, 144], 20, 69, 64_032),
    ],
)
def test_cost_is_as_documented(
    heads: int, counts: list[int], margin: int, asked: int, most: int
) -> None:
    """The table of docs/find-heads.md: search and test, with the other defaults."""
    config = SearchConfig()
    tested = 2 * len(counts) * config.problems
    ranking = [(0, head) for head in range(heads)]
    assert len(heads_in_question(ranking, counts, margin)) == asked
    assert most_answers(asked, len(counts), config.candidates, config.problems) + tested == most


def test_what_always_streams_is_under_everything(tmp_path: Path) -> None:
    model = Model()
    found_by(model, tmp_path, counts=[10], margin=3)
    assert all({*HEADS[:7]} <= {*one} for _, one in model.asked)
    assert not any({*HEADS[13:]} & {*one} for _, one in model.asked)


def test_of_equal_ones_the_known_one_is_the_best(tmp_path: Path) -> None:
    ranking = random.Random(1).sample(HEADS, len(HEADS))
    found = found_by(Model(lambda streaming: 0.5), tmp_path, ranking)
    assert found.best == nested_of(ranking, (8, 10))
    assert not found.needed


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("straight", "killed")]
    for folder in folders:
        folder.mkdir()
    model = Model()
    expected = found_by(model, folders[0])
    for dies_after in (0, 300, 1000, 2000):
        with pytest.raises(KeyboardInterrupt):
            found_by(Model(dies_after=dies_after), folders[1])
    again = Model()
    assert found_by(again, folders[1]) == expected
    assert 0 < len(again.asked) < len(model.asked) - 2000
    straight, killed = ((folder / "answers.json").read_bytes() for folder in folders)
    assert straight == killed


def test_a_killed_search_asks_with_the_same_seeds(tmp_path: Path) -> None:
    """Sampled answers depend on the seed of their chunk."""
    seeds: list[int] = []

    def solve(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        seeds.append(seed)
        return [True] * len(problems)

    def store(name: str) -> Store:
        return Store(tmp_path / name, "test", {})

    wanted = [nested_of(HEADS, [count])[0] for count in range(1, 9)]
    Answers(solve, store("straight.json"), 10, seed=7).ask(wanted, 5)
    straight, seeds[:] = list(seeds), []
    assert len({*straight}) == len(straight) == 4

    def dies(problems: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return solve(problems, streaming, seed)

    with pytest.raises(KeyboardInterrupt):
        Answers(dies, store("killed.json"), 10, seed=7).ask(wanted, 5)
    Answers(solve, store("killed.json"), 10, seed=7).ask(wanted, 5)
    assert seeds == straight


def test_a_process_that_does_not_write_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    answers = Answers(Model(), Store(path, "test", {}, is_writer=False), 64)
    assert answers.ask([()], 100) == {(): fmean(hard < 0.95 for hard in DIFFICULTY[:100])}
    assert not path.exists()


def test_full_heads_are_the_others() -> None:
    assert full_heads(((0, 1), (2, 0), (2, 1)), 3, 2) == [[0], [0, 1], []]
