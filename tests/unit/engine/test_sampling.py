"""vLLM's sampling parameters from ours."""

import pytest

pytest.importorskip("vllm")

from rlkv_vllm.answers import Sampling
from rlkv_vllm.engine.gated.live import sampling_params
from rlkv_vllm.engine.sampling import vllm_sampling
from rlkv_vllm.evaluation.served import _sampling_params


def test_every_parameter_arrives() -> None:
    sampling = Sampling(
        max_tokens=9,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.2,
        stop_token_ids=(3, 4),
        seed=7,
    )
    found = vllm_sampling(sampling, 2, logprobs=1)
    for name in Sampling.model_fields.keys() - {"seed", "stop_token_ids"}:
        assert getattr(found, name) == getattr(sampling, name), name
    assert (found.stop_token_ids, found.seed, found.logprobs) == ([3, 4], 9, 1)


def test_every_answer_has_a_seed_of_its_own() -> None:
    sampling = Sampling(max_tokens=9, seed=7)
    assert [sampling_params(sampling, i).seed for i in range(3)] == [7, 8, 9]
    assert [one.seed for one in _sampling_params(sampling, range(2))] == [7_000_021, 7_000_022]


def test_greedy_answers_need_no_seed() -> None:
    greedy = Sampling(max_tokens=9, temperature=0, seed=7)
    assert vllm_sampling(greedy, 2).seed is None
    assert not sampling_params(greedy, 0).detokenize
