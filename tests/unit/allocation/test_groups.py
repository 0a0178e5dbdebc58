import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation import CacheGeometry, Forecast, allocate, pack
from rlkv_vllm.allocation.groups import FULL_GROUP, NEAR_TIE
from tests.support.profiles import random_gates


def clustered_gates(layers, heads, seed):
    """Gates that are alike within a layer, so that many layers have no or only full heads."""
    rng = random.Random(seed)
    levels = [rng.random() for _ in range(layers)]
    return [[level + rng.gauss(0, 0.1) for _ in range(heads)] for level in levels]


def equal_gates(layers, heads, seed):
    rng = random.Random(seed)
    return [[rng.random()] * heads for _ in range(layers)]


KINDS = [random_gates, clustered_gates, equal_gates]


def check(groups):
    """All that must hold for any packing."""
    allocation = groups.allocation
    used = set()
    for rank in range(allocation.tp_size):
        seen = [0] * (groups.num_ring_groups + 1)
        for layer in range(allocation.num_layers):
            local = {
                head: groups.group_of[layer][head] for head in groups.allocation.heads_of(rank)
            }
            for head, group in local.items():
                assert (group == FULL_GROUP) == (head in allocation.full[layer])
                assert 0 <= group <= groups.num_ring_groups
                seen[group] += 1
            assert len(set(local.values())) <= 2
        pages = groups.pages_per_block(rank)
        assert pages == max(seen)
        for group, size in enumerate(seen):
            assert groups.size(rank, group) == size
            if group in groups.groups:
                assert groups.padding(rank, group) == pages - size
                if size:
                    used.add(group)
            else:
                assert size == groups.padding(rank, group) == 0
    assert used == set(groups.groups)


def layer_need(allocation, rank):
    """Least size of a ring group that one layer's ring heads ask for."""
    need = 0
    for layer in range(allocation.num_layers):
        ring = len(allocation.streaming_on(rank, layer))
        need = max(need, ring if ring < allocation.heads_per_rank else -(-ring // 2))
    return need


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    layers=st.integers(1, 12),
    heads=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    sparsity=st.floats(0, 1),
    full_blocks=st.integers(1, 3000),
    ring_blocks=st.integers(1, 40),
)
def test_every_packing_keeps_the_rules(
    kind, layers, heads, tp, seed, sparsity, full_blocks, ring_blocks
):
    allocation = allocate(kind(layers, heads, seed), sparsity, tp)
    groups = pack(allocation, full_blocks=full_blocks, ring_blocks=ring_blocks)
    check(groups)
    ranks = range(tp)
    if allocation.num_full and all(
        allocation.num_full_on(rank) >= layer_need(allocation, rank) for rank in ranks
    ):
        most = max(allocation.num_full_on(rank) for rank in ranks)
        assert all(groups.pages_per_block(rank) <= most for rank in ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("layers", "heads"), [(28, 8), (36, 8), (32, 8), (28, 4)])
def test_waste_within_4_percent_at_every_sparsity(layers, heads, tp, kind):
    gates = kind(layers, heads, seed=layers)
    geometry = CacheGeometry(layers, heads, 128, 2, block_size=16, sink=16, window=64)
    checked = 0
    for streaming in range(layers * heads + 1):
        allocation = allocate(gates, streaming / (layers * heads), tp)
        assert allocation.num_streaming == streaming
        groups = pack(allocation, full_blocks=256, ring_blocks=6)
        forecast = Forecast(geometry, groups)
        fewest = min(allocation.num_full_on(rank) for rank in range(tp))
        if fewest >= heads:
            checked += 1
            assert forecast.waste(4096) <= 0.04, streaming
            if tp == 1:
                assert groups.padding(0, FULL_GROUP) == 0
        elif not allocation.num_full:
            assert forecast.waste(4096) == 0
    assert checked == layers * heads - heads * tp + 1
    check(groups)


def brute_force_cost(allocation, full_blocks, ring_blocks):
    """Cheapest packing of one rank by trying every ring group of every streaming head."""
    heads = [
        (layer, head)
        for layer in range(allocation.num_layers)
        for head in range(allocation.num_kv_heads)
        if head not in allocation.full[layer]
    ]
    allowed = {layer: 1 if allocation.full[layer] else 2 for layer, _ in heads}
    best = float("inf")

    def place(index, sizes, used):
        nonlocal best
        if index == len(heads):
            pages = max([allocation.num_full, *sizes])
            if allocation.num_full < layer_need(allocation, 0) or pages == allocation.num_full:
                full = full_blocks if allocation.num_full else 0
                best = min(best, pages * (full + len(sizes) * ring_blocks))
            return
        layer, _ = heads[index]
        for group in range(len(sizes) + 1):
            groups = used.get(layer, frozenset()) | {group}
            if len(groups) <= allowed[layer]:
                grown = [*sizes, 0] if group == len(sizes) else list(sizes)
                grown[group] += 1
                place(index + 1, grown, used | {layer: groups})

    place(0, [], {})
    return best


@pytest.mark.parametrize("seed", range(25))
def test_as_cheap_as_brute_force_on_small_models(seed):
    rng = random.Random(seed)
    allocation = allocate(random_gates(4, 2, seed), rng.choice([0.4, 0.5, 0.7, 0.8, 0.9]))
    if not allocation.num_full:
        allocation = allocate(random_gates(4, 2, seed), 0.8)
    full_blocks, ring_blocks = rng.choice([(256, 6), (64, 6), (10, 6)])
    groups = pack(allocation, full_blocks=full_blocks, ring_blocks=ring_blocks)
    cost = groups.pages_per_block(0) * (full_blocks + groups.num_ring_groups * ring_blocks)
    assert cost <= NEAR_TIE * brute_force_cost(allocation, full_blocks, ring_blocks)


def test_no_streaming_and_no_full_heads():
    all_full = pack(allocate(random_gates(3, 4), 0.0), full_blocks=256, ring_blocks=6)
    assert (all_full.groups, all_full.pages_per_block(0)) == ((FULL_GROUP,), 12)
    all_streaming = pack(allocate(random_gates(3, 4), 1.0), full_blocks=256, ring_blocks=6)
    assert (all_streaming.groups, all_streaming.pages_per_block(0)) == ((1,), 12)
    assert all_streaming.padding(0, FULL_GROUP) == 0


def test_a_layer_without_full_heads_may_use_two_ring_groups():
    # 4 full heads; the all-streaming layer of 8 needs two groups of 4.
    gates = [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    groups = pack(allocate(gates, 8 / 12), full_blocks=1000, ring_blocks=1)
    assert groups.pages_per_block(0) == 4
    gates = [[1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    groups = pack(allocate(gates, 6 / 8), full_blocks=1000, ring_blocks=1)
    assert groups.pages_per_block(0) == 2
    assert len(set(groups.group_of[1])) == 2
    check(groups)


def test_replicated_ranks_are_packed_alike():
    groups = pack(allocate(random_gates(9, 2), 0.6, tp_size=8), full_blocks=256, ring_blocks=6)
    check(groups)
    for rank in range(8):
        for group in groups.groups:
            assert groups.size(rank, group) == groups.size(rank // 4 * 4, group)


def test_fast_and_cached():
    # 36 layers x 8 heads with few full heads is the slowest case found.
    allocation = allocate(equal_gates(36, 8, 0), 284 / 288)
    pack.cache_clear()
    start = time.process_time()
    first = pack(allocation, full_blocks=256, ring_blocks=6)
    assert time.process_time() - start < 0.05
    assert pack(allocation, full_blocks=256, ring_blocks=6) is first


@pytest.mark.parametrize(("full_blocks", "ring_blocks"), [(0, 6), (256, 0)])
def test_refuses_empty_requests(full_blocks, ring_blocks):
    with pytest.raises(ValueError, match="at least 1"):
        pack(allocate([[1.0]], 0.0), full_blocks=full_blocks, ring_blocks=ring_blocks)
