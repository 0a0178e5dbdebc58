import pytest

from rlkv_vllm.allocation.forecast import CacheGeometry, forecast_split
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.planning.fleet import (
    GPUS,
    Lengths,
    Replica,
    pair_lengths,
    read_lengths,
    replicas_of,
    sustained,
)
from rlkv_vllm.planning.roofline import ModelSize
from tests.support.profiles import random_gates

MODEL = ModelSize(28, 2048, 6144, 16, 8, 128, vocab=32000)
GATES = random_gates(28, 8)
LENGTHS = pair_lengths(read_lengths("", "64-256"), read_lengths("", "200-600"), 4096)


def replicas(sparsity: float = 0.5, memory: float = 4.0, seqs: int = 1024) -> dict[str, Replica]:
    forecasts = {
        size: forecast_split(GATES, sparsity, CacheGeometry(28, 8, 128, size, 16, 16, 64))
        for size in (2, 1)
    }
    found = replicas_of(
        MODEL,
        GPUS["H100-80GB"],
        forecasts,
        tp_size=1,
        memory_bytes=int(memory * 2**30),
        max_num_seqs=seqs,
        split_fp8_note="refused",
    )
    return {replica.name: replica for replica in found}


def test_split_and_fp8_each_nearly_double_what_runs() -> None:
    found = {name: sustained(r, LENGTHS) for name, r in replicas(0.5).items()}
    full = found["full cache"].running
    assert found["full cache + FP8"].running == pytest.approx(2 * full, rel=0.01)
    assert 1.6 * full < found["split"].running < 2 * full
    assert found["split + FP8"].running == pytest.approx(2 * found["split"].running, rel=0.01)
    assert all(each.limit == "memory" for each in found.values())
    rates = [each.requests_per_s for each in found.values()]
    assert rates[0] < min(rates[1:])
    assert max(rates) == rates[3]


def test_only_the_split_with_fp8_has_a_note() -> None:
    assert [r.note for r in replicas().values()] == ["", "", "", "refused"]


def test_limits() -> None:
    by_seqs = sustained(replicas(seqs=10)["split"], LENGTHS)
    assert (by_seqs.running, by_seqs.limit) == (10, "--max-num-seqs")
    free = sustained(replicas()["split"], LENGTHS)
    wanted = free.step_seconds * 0.9
    by_speed = sustained(replicas()["split"], LENGTHS, wanted)
    assert by_speed.limit == "--tpot"
    assert by_speed.step_seconds == pytest.approx(wanted, rel=0.01)
    assert by_speed.running < free.running
    with pytest.raises(RlkvError, match="--tpot"):
        sustained(replicas()["split"], LENGTHS, 1e-6)
    with pytest.raises(RlkvError, match="does not fit in the cache"):
        sustained(replicas(memory=0.05)["full cache"], LENGTHS)


def test_replicas_for_a_traffic() -> None:
    one = sustained(replicas()["split"], LENGTHS)
    assert one.replicas(one.requests_per_s * 0.8, 0.8) == 1
    assert one.replicas(one.requests_per_s * 0.81, 0.8) == 2
    assert one.replicas(one.requests_per_s * 8, 0.8) == 10


def test_a_full_cache_of_a_split_without_streaming_heads_is_the_same() -> None:
    found = {name: sustained(r, LENGTHS) for name, r in replicas(0.0).items()}
    assert found["split"] == found["full cache"]


def test_longer_requests_are_met_more_often() -> None:
    lengths = Lengths(((0, 100), (0, 300)))
    # (100 * 50 + 300 * 150) / 400
    assert lengths.mean_in_flight(lambda context: context) == pytest.approx(125)
    assert lengths.output == 200


def test_lengths_of_a_text() -> None:
    assert read_lengths("", "300") == [300]
    even = read_lengths("", "100-500")
    assert (min(even) > 100, max(even) < 500, sum(even) / len(even)) == (True, True, 300)
    skewed = sorted(read_lengths("", "1000~4000"))
    assert skewed[15] < 1000 < skewed[16]
    assert skewed[-3] < 4000 < skewed[-2]
    for bad in ("", "0", "many", "5-3", "4000~1000", "-5", "1.5"):
        with pytest.raises(RlkvError, match="--output-tokens"):
            read_lengths("--output-tokens", bad)


def test_pairs_keep_both_distributions_and_the_limit() -> None:
    prompts, outputs = read_lengths("", "100-900"), read_lengths("", "100-900")
    pairs = pair_lengths(prompts, outputs, 5000).pairs
    assert sorted(p for p, _ in pairs) == sorted(prompts)
    assert sorted(o for _, o in pairs) == sorted(outputs)
    assert any(p < 300 < 700 < o for p, o in pairs)
    assert max(p + o for p, o in pair_lengths(prompts, outputs, 1000).pairs) <= 1000
    with pytest.raises(RlkvError, match="no room for an answer"):
        pair_lengths([1000], [10], 1000)
