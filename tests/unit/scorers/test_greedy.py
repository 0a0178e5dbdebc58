"""Greedy pruning against an order in which every head is evaluated at every step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlkv_vllm.allocation.streaming import Head
from rlkv_vllm.hf.answer_loss import Sample, SplitLoss
from rlkv_vllm.scorers.greedy import SCORER, spread_lengths, streaming_order
from rlkv_vllm.scorers.scorer import ScoringInput
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS, VOCAB, make_checkpoint

SINK, WINDOW = 2, 5
HEADS = [*product(range(3), range(3))]

pytestmark = pytest.mark.usefixtures("one_thread")


def every_head_every_time(
    loss: Callable[[Collection[Head]], float], heads: Collection[Head]
) -> list[Head]:
    order: list[Head] = []
    while len(order) < len(heads):
        left = [head for head in heads if head not in order]
        order.append(min(left, key=lambda head: (loss((*order, head)), head)))
    return order


def supermodular(seed: int) -> Callable[[Collection[Head]], float]:
    """Every head costs more, the more heads stream."""
    rng = random.Random(seed)
    weight = {head: rng.randrange(1, 5) / 4 for head in HEADS}
    power = rng.choice([1, 2, 3])
    pair = {frozenset(two): rng.randrange(3) / 4 for two in product(HEADS, HEADS)}

    def loss(streaming: Collection[Head]) -> float:
        both = sum(pair[frozenset(two)] for two in product(streaming, streaming))
        return float(sum(weight[head] for head in streaming) ** power + both)

    return loss


@given(seed=st.integers(0, 10_000))
def test_lazy_evaluation_finds_the_order_of_all_evaluations(seed: int) -> None:
    loss = supermodular(seed)
    assert streaming_order(loss, HEADS, len(HEADS)) == every_head_every_time(loss, HEADS)


@given(values=st.lists(st.integers(0, 9), min_size=32, max_size=32), steps=st.integers(1, 5))
def test_a_chosen_head_is_the_best_of_those_evaluated(values: list[int], steps: int) -> None:
    """Whatever the losses: its rise is fresh, and no known rise of another head is lower."""
    heads = HEADS[:5]
    table = {
        frozenset(head for i, head in enumerate(heads) if bits >> i & 1): float(value)
        for bits, value in enumerate(values)
    }
    asked: list[frozenset[Head]] = []

    def loss(streaming: Collection[Head]) -> float:
        asked.append(frozenset(streaming))
        return table[asked[-1]]

    order = streaming_order(loss, heads, steps)
    assert sorted(order) == heads
    for done in range(steps):
        base = frozenset(order[:done])
        newest = {}
        for size in range(done + 1):
            before = frozenset(order[:size])
            newest |= {
                head: table[before | {head}] - table[before]
                for head in heads
                if head not in base and before | {head} in asked
            }
        assert base | {order[done]} in asked
        assert newest[order[done]] == min(newest.values())


def test_lazy_evaluation_saves_evaluations() -> None:
    asked: list[Collection[Head]] = []
    weight = {head: 2.0**i for i, head in enumerate(reversed(HEADS))}

    def loss(streaming: Collection[Head]) -> float:
        asked.append(streaming)
        return sum(weight[head] for head in streaming)

    assert streaming_order(loss, HEADS, len(HEADS)) == HEADS[::-1]
    assert len(asked) == 1 + len(HEADS) + len(HEADS) - 1


def test_equal_heads_stream_by_layer_and_number() -> None:
    assert streaming_order(lambda streaming: 0.0, HEADS[::-1], 4) == HEADS


def test_later_heads_keep_the_order_of_their_last_cost() -> None:
    loss = supermodular(3)
    whole = streaming_order(loss, HEADS, len(HEADS))
    part = streaming_order(loss, HEADS, 3)
    assert part[:3] == whole[:3]
    alone = {head: loss((head,)) for head in HEADS}
    first = streaming_order(loss, HEADS, 1)
    assert first[1:] == sorted(set(HEADS) - {first[0]}, key=lambda head: (alone[head], head))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), count=st.integers(1, 50))
def test_answers_are_spread_over_their_lengths(lengths: list[int], count: int) -> None:
    given = [Sample([i], [0] * length) for i, length in enumerate(lengths)]
    chosen = spread_lengths(given, count, 10_000)
    assert len({s.prompt_ids[0] for s in chosen}) == len(chosen) == min(count, len(lengths))
    ranked = sorted(lengths)
    for i, sample in enumerate(chosen):
        part = len(lengths) / len(chosen)
        low, high = ranked[math.floor(i * part)], ranked[math.ceil((i + 1) * part) - 1]
        assert low <= len(sample.completion_ids) <= high


def test_long_answers_are_fewer() -> None:
    given = [Sample([1] * 10, [0] * length) for length in (90, 10, 40, 60, 20)]
    assert [len(s) for s in spread_lengths(given, 5, 270)] == [20, 30, 50, 70, 100]
    assert [len(s) for s in spread_lengths(given, 5, 269)] == [20, 30, 70, 100]
    assert [len(s) for s in spread_lengths(given, 2, 269)] == [30, 70]
    assert [len(s) for s in spread_lengths(given, 5, 1)] == [50]


# --- on a model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Any:
    path: Path = make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def scoring_input(model: Any, **changes: Any) -> ScoringInput:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, VOCAB, (n,), generator=g).tolist() for n in (30, 44, 21)]
    nothing: Any = None
    options: dict[str, Any] = {
        "samples": [Sample(row[:12], row[12:]) for row in rows],
        "settings": SCORER.settings(changes.pop("settings", {})),
        "report": lambda *_: None,
    }
    return ScoringInput(
        model=model, tokenizer=nothing, task=nothing, problems=[], sink=SINK, window=WINDOW, seed=0,
        **(options | changes),
    )  # fmt: skip


def ranked(gates: list[list[float]]) -> list[Head]:
    heads = [(i, j) for i, row in enumerate(gates) for j in range(len(row))]
    return sorted(heads, key=lambda head: gates[head[0]][head[1]])


def test_the_gates_are_the_order_of_streaming(model: Any) -> None:
    work: dict[str, Any] = {}
    gates = SCORER.score(scoring_input(model, work=work))
    count = NUM_LAYERS * NUM_KV_HEADS
    values = sorted(gate for row in gates for gate in row)
    assert values == pytest.approx([i / (count - 1) for i in range(count)])
    order = ranked(gates)
    with SplitLoss(model, scoring_input(model).samples, SINK, WINDOW) as loss:
        alone = {head: loss((head,)) for head in loss.heads}
        assert order[0] == min(alone, key=lambda head: alone[head])
        fresh = every_head_every_time(loss, loss.heads)
    assert order[:3] == fresh[:3]
    assert len(work["losses"]) < count * (count + 1) / 2


def test_the_settings_say_what_is_evaluated(model: Any) -> None:
    work: dict[str, Any] = {}
    said: list[str] = []
    SCORER.score(
        scoring_input(model, work=work, say=said.append, settings={"until": 0.05, "answers": 2})
    )
    assert len(work["losses"]) == 1 + NUM_LAYERS * NUM_KV_HEADS  # one step: all heads alone
    (line,) = said
    assert line.startswith("greedy: 2 answers, ")
    assert "minutes" in line


@pytest.mark.parametrize("after", [1, 17, 25])
def test_a_killed_run_continues(model: Any, after: int) -> None:
    expected: dict[str, Any] = {}
    gates = SCORER.score(scoring_input(model, work=expected))
    work: dict[str, Any] = {}
    saved: list[int] = []

    def report(done: int, *_: object) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SCORER.score(
            scoring_input(
                model, work=work, report=report, save=lambda: saved.append(len(work["losses"]))
            )
        )
    done = len(work["losses"])
    assert done == saved[-1] >= after
    assert (
        SCORER.score(
            scoring_input(model, work=work, save=lambda: saved.append(len(work["losses"])))
        )
        == gates
    )
    assert work == expected
    assert saved == [*range(1, len(expected["losses"]) + 1)]  # nothing is evaluated twice
