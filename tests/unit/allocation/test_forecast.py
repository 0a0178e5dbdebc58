import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkv_vllm.allocation import CacheGeometry, forecast_split, ring_blocks
from tests.support.profiles import random_gates

GIB = 2**30


def geometry(layers=28, heads=8, **changes):
    sizes = {"head_dim": 128, "dtype_bytes": 2, "block_size": 16, "sink": 16, "window": 64}
    return CacheGeometry(layers, heads, **(sizes | changes))


@given(
    num_tokens=st.integers(1, 700),
    sink=st.integers(0, 70),
    window=st.integers(1, 130),
    block_size=st.sampled_from([1, 16, 32]),
)
def test_ring_blocks_is_the_peak_of_a_decoding_request(num_tokens, sink, window, block_size):
    """Token by token: blocks that hold a sink token or one of the last `window` tokens."""
    peak = 0
    for length in range(1, num_tokens + 1):
        kept = {k // block_size for k in range(min(sink, length))}
        kept |= {k // block_size for k in range(max(0, length - window), length)}
        peak = max(peak, len(kept))
    forecast = ring_blocks(num_tokens, sink, window, block_size)
    assert peak <= forecast
    # Exact once the request is long enough for the window to leave the sinks behind.
    if num_tokens >= sink + window + 2 * block_size:
        assert forecast == peak


def test_stock_is_what_vllm_computes():
    forecast = forecast_split(random_gates(28, 8), 0.0, geometry())
    # 2 (K, V) x 28 layers x 8 heads x 128 x 2 bytes
    assert forecast.stock_bytes_per_token == 114_688 == forecast.bytes_per_token(0)
    assert forecast.stock_bytes_per_request(4096) == 4096 * 114_688
    assert forecast.bytes_per_request(4096, 0) == 4096 * 114_688
    assert forecast.stock_num_blocks(8 * GIB) == 8 * GIB // (114_688 * 16)
    assert forecast.num_blocks(8 * GIB) == forecast.stock_num_blocks(8 * GIB)
    # One of the blocks is the null block.
    assert forecast.stock_requests_at_once(4096, 114_688 * 16 * 256) == 0
    assert forecast.stock_requests_at_once(4096, 114_688 * 16 * 257) == 1
    assert forecast.requests_at_once(4096, 114_688 * 16 * 257) == 1
    assert forecast.waste(4096) == 0


def test_split_by_hand():
    # 4 full, 4 streaming heads: one ring group, 4 pages per block, nothing padded.
    gates = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    forecast = forecast_split(gates, 0.5, geometry(2, 4))
    page = 16 * 2 * 128 * 2
    assert forecast.groups.num_ring_groups == 1
    assert forecast.block_bytes(0) == 4 * page
    assert forecast.bytes_per_token(0) == 4 * 512 == forecast.stock_bytes_per_token // 2
    assert forecast.blocks_per_request(4096) == 256 + 6
    assert forecast.bytes_per_request(4096, 0) == 262 * 4 * page
    assert forecast.ideal_bytes_per_request(4096, 0) == 262 * 4 * page
    assert forecast.blocks_per_request(1) == 2
    assert forecast.num_blocks(10 * 4 * page + 1) == 10
    assert forecast.requests_in(1 + 2 * 262, 4096) == 2
    assert forecast.requests_in(2 * 262, 4096) == 1
    assert forecast.requests_in(0, 4096) == 0


def test_all_streaming_costs_nothing_per_token():
    forecast = forecast_split(random_gates(2, 4), 1.0, geometry(2, 4))
    assert forecast.bytes_per_token(0) == 0
    assert forecast.blocks_per_request(4096) == forecast.blocks_per_request(10**6) == 6
    assert forecast.requests_at_once(10**6, GIB) > 1000 * forecast.stock_requests_at_once(
        10**6, GIB
    )


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_request_within_3_percent_of_ideal(sparsity):
    forecast = forecast_split(random_gates(28, 8), sparsity, geometry())
    actual = forecast.bytes_per_request(4096, 0)
    ideal = forecast.ideal_bytes_per_request(4096, 0)
    assert ideal <= actual <= 1.03 * ideal
    assert forecast.waste(4096) == actual / ideal - 1


def test_half_the_heads_give_nearly_twice_the_requests():
    forecast = forecast_split(random_gates(28, 8), 0.5, geometry())
    split = forecast.requests_at_once(4096, 64 * GIB)
    assert split >= 1.9 * forecast.stock_requests_at_once(4096, 64 * GIB)


def test_the_rank_with_most_full_heads_decides():
    forecast = forecast_split(random_gates(3, 2), 0.5, geometry(3, 2), tp_size=2)
    counts = [forecast.groups.allocation.num_full_on(rank) for rank in forecast.ranks]
    assert sorted(counts) == [1, 2]
    most = max(forecast.block_bytes(rank) for rank in forecast.ranks)
    assert forecast.num_blocks(100 * most) == 100
    assert forecast.stock_bytes_per_token == 3 * 512


@given(
    sparsity=st.floats(0, 1),
    tp=st.sampled_from([1, 2, 4, 8]),
    num_tokens=st.integers(1, 10_000),
    seed=st.integers(0, 5),
)
def test_never_less_than_ideal(sparsity, tp, num_tokens, seed):
    forecast = forecast_split(random_gates(5, 4, seed), sparsity, geometry(5, 4), tp_size=tp)
    for rank in forecast.ranks:
        ideal = forecast.ideal_bytes_per_request(num_tokens, rank)
        assert 0 < ideal <= forecast.bytes_per_request(num_tokens, rank)
    assert forecast.waste(num_tokens) >= 0


def test_short_models_are_packed_for_their_length():
    # With requests of one block a ring saves nothing, so a second ring group only costs.
    gates = [[1.0, 0.0, 0.0, 0.0]] + [[0.0] * 4] * 3
    short = forecast_split(gates, 12 / 16, geometry(4, 4), max_model_len=16)
    long = forecast_split(gates, 12 / 16, geometry(4, 4))
    assert short.groups.num_ring_groups <= long.groups.num_ring_groups
    assert forecast_split(gates, 12 / 16, geometry(4, 4), max_model_len=10**6) == long
