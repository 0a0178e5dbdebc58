import pytest

from rlkv_vllm.allocation import CacheGeometry, forecast_split
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.planning.roofline import Device, HeadCache, ModelSize, Roofline

MODEL = ModelSize(layers=2, hidden=64, intermediate=128, q_heads=4, kv_heads=2, head_dim=16)
CACHE = HeadCache(num_full=1, num_streaming=3, ring=20, head_dim=16, q_per_kv=2)
#: So slow in operations that only they count, and so slow in bytes that only those do.
FLOPS_BOUND = Device("slow maths", 1, 1e18, 1e6)
BYTES_BOUND = Device("slow memory", 1, 1e6, 1e18)


def visible_keys(first: int, last: int) -> int:
    """Counted one by one, for sink 4 and window 16."""
    full = sum(range(first, last))
    ring = sum(k < 4 or k > q - 16 for q in range(first, last) for k in range(q + 1)) - (
        last - first
    )
    return CACHE.num_full * full + CACHE.num_streaming * ring


@pytest.mark.parametrize(("first", "last"), [(0, 10), (0, 200), (10, 30), (50, 90)])
def test_pairs_are_the_visible_keys(first: int, last: int) -> None:
    # The formula integrates: half a key per query and head is the difference.
    slack = (last - first) * (CACHE.num_full + CACHE.num_streaming)
    assert abs(CACHE.pairs(first, last) - visible_keys(first, last)) <= slack


def test_decode_reads_weights_and_visible_keys() -> None:
    roofline = Roofline(BYTES_BOUND, MODEL, CACHE)
    assert CACHE.head_tokens(100) == 100 + 3 * 20
    assert CACHE.head_tokens(10) == 4 * 10
    cache_bytes = 5 * 160 * 2 * 16 * 2
    expected = (MODEL.weight_bytes + cache_bytes) / 1e6
    assert roofline.decode_seconds(5, 100) == pytest.approx(expected)


def test_prefill_is_operations() -> None:
    whole = Roofline(FLOPS_BOUND, MODEL, CACHE).prefill_seconds(300, chunk=1000)
    body = MODEL.step_weights - MODEL.head_weights
    operations = 2 * (body * 300 + MODEL.head_weights) + 4 * 16 * 2 * CACHE.pairs(0, 300)
    assert whole == pytest.approx(operations / 1e6)
    # Chunks do the same work, but for the output layer, which each of them passes.
    chunked = Roofline(FLOPS_BOUND, MODEL, CACHE).prefill_seconds(300, chunk=100)
    assert chunked == pytest.approx(whole + 2 * 2 * MODEL.head_weights / 1e6)


def test_sizes_of_a_config() -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    }
    assert ModelSize.from_config(config) == MODEL
    assert MODEL.resident_bytes - MODEL.weight_bytes == 2 * 64 * 4096
    assert MODEL.token_bytes == 2 * 2 * 2 * 16 * 2
    with pytest.raises(RlkvError, match="experts"):
        ModelSize.from_config(config | {"num_experts": 8})
    with pytest.raises(RlkvError, match="intermediate_size None"):
        ModelSize.from_config({k: v for k, v in config.items() if k != "intermediate_size"})


def test_the_rank_that_reads_most_is_taken() -> None:
    gates = [[0.9, 0.1], [0.8, 0.7]]
    geometry = CacheGeometry(2, 2, 16, 2, block_size=16, sink=4, window=16)
    cache = HeadCache.of(forecast_split(gates, 0.25, geometry, tp_size=2), MODEL)
    assert (cache.num_full, cache.num_streaming, cache.ring) == (2, 0, 20)
