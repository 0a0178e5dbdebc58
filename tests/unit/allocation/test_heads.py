import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkv_vllm.allocation import allocate
from rlkv_vllm.errors import RlkvError
from tests.support.profiles import random_gates

TP_SIZES = {1: (1, 2, 4), 2: (1, 2, 4), 3: (1, 3, 6), 4: (1, 2, 4, 8), 8: (1, 2, 4, 8, 16)}


@st.composite
def cases(draw):
    heads = draw(st.sampled_from(sorted(TP_SIZES)))
    layers = draw(st.integers(1, 9))
    gate = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)  # with many equal gates
    gates = draw(
        st.lists(st.lists(gate, min_size=heads, max_size=heads), min_size=layers, max_size=layers)
    )
    return gates, draw(st.floats(0, 1)), draw(st.sampled_from(TP_SIZES[heads]))


@given(cases())
def test_exact_deterministic_and_balanced(case):
    gates, sparsity, tp = case
    layers, heads = len(gates), len(gates[0])
    allocation = allocate(gates, sparsity, tp)
    assert allocation == allocate([list(row) for row in gates], sparsity, tp)
    assert allocation.num_streaming == round(sparsity * layers * heads)
    assert allocation.num_full + allocation.num_streaming == layers * heads == allocation.num_heads
    for layer in range(layers):
        assert list(allocation.full[layer]) == sorted(set(allocation.full[layer]))
        assert set(allocation.full[layer]) <= set(range(heads))
    counts = [allocation.num_full_on(rank) for rank in range(tp)]
    assert max(counts) - min(counts) <= 1
    for rank in range(tp):
        local = allocation.heads_of(rank)
        assert len(local) == allocation.heads_per_rank
        assert counts[rank] + allocation.num_streaming_on(rank) == layers * len(local)
        # Within a rank no streaming head ranks above a full one.
        order = sorted((-gates[n][h], n, h) for n in range(layers) for h in local)
        chosen = {(n, h) for n in range(layers) for h in allocation.full[n] if h in local}
        assert {(n, h) for _, n, h in order[: counts[rank]]} == chosen
        for layer in range(layers):
            full = {head for head in allocation.full[layer] if head in local}
            assert sorted(full.union(allocation.streaming_on(rank, layer))) == list(local)
            assert full.isdisjoint(allocation.streaming_on(rank, layer))


@given(cases())
def test_every_head_is_on_some_rank(case):
    gates, sparsity, tp = case
    allocation = allocate(gates, sparsity, tp)
    owned = [head for rank in range(tp) for head in allocation.heads_of(rank)]
    assert sorted(owned) == owned
    copies = max(1, tp // len(gates[0]))
    assert owned == [head for head in range(len(gates[0])) for _ in range(copies)]


def test_of_equal_gates_the_lower_layer_then_the_lower_head_stays_full():
    assert allocate([[0.5] * 3] * 3, 5 / 9).full == ((0, 1, 2), (0,), ())


def test_without_ranks_the_highest_gates_win_anywhere():
    gates = [[0.9, 0.8], [0.1, 0.2], [0.7, 0.3]]
    assert allocate(gates, 0.5).full == ((0, 1), (), (0,))


def test_the_extra_full_head_goes_to_the_rank_whose_next_gate_is_highest():
    gates = [[0.9, 0.3, 0.9, 0.4]]
    assert allocate(gates, 0.25, tp_size=2).full == ((0, 2, 3),)
    tie = [[0.9, 0.4, 0.9, 0.4]]
    assert allocate(tie, 0.25, tp_size=2).full == ((0, 1, 2),)


def test_more_ranks_than_heads_replicate():
    allocation = allocate(random_gates(4, 2), 0.5, tp_size=8)
    assert [allocation.heads_of(rank) for rank in range(8)] == [range(1)] * 4 + [range(1, 2)] * 4
    assert allocation.num_full == 4
    assert [allocation.num_full_on(rank) for rank in range(8)] == [2] * 8


def test_python_rounding_to_even():
    gates = random_gates(1, 5)
    assert allocate(gates, 0.5).num_streaming == round(2.5) == 2
    assert allocate(gates, 0.7).num_streaming == round(3.5) == 4


@pytest.mark.parametrize("sparsity", [-0.01, 1.0001, 1.5, math.nan, math.inf, "0.5", None, True])
def test_refuses_a_sparsity_that_is_no_share(sparsity):
    with pytest.raises(RlkvError, match=r"--sparsity .*\[0, 1\]"):
        allocate([[0.5]], sparsity)


@pytest.mark.parametrize(("heads", "tp"), [(8, 3), (8, 12), (2, 3), (4, 0), (4, -1)])
def test_refuses_ranks_that_do_not_fit(heads, tp):
    with pytest.raises(RlkvError, match=f"--tp {tp}: must divide the {heads} KV heads"):
        allocate(random_gates(2, heads), 0.5, tp)


@pytest.mark.parametrize("gates", [[], [[]], [[0.5], [0.5, 0.5]], [[math.nan]], [[math.inf]]])
def test_refuses_what_is_no_table_of_numbers(gates):
    with pytest.raises(RlkvError, match="gates"):
        allocate(gates, 0.5)
