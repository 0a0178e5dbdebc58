"""The served engine of `rlkv eval` against the same heads by mask."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkv_vllm.answers import Sampling
from rlkv_vllm.evaluation.served import opened
from rlkv_vllm.evaluation.splits import find_candidates, plan
from rlkv_vllm.hf import answers
from rlkv_vllm.models import model_dir
from rlkv_vllm.tasks import get_task
from tests.support.engines import EngineCache

N = 12
SAMPLING = Sampling(max_tokens=120, temperature=0)


def test_served_answers_are_those_of_the_masked_model(engines: EngineCache) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    task = get_task("embedded")
    problems = task.problems(N, seed=11)
    split = plan(find_candidates(["embedded"]), [0.5])[1]
    source = model_dir()
    engines.close()
    try:
        options = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
        }
        with opened(str(source), split, task, problems, SAMPLING, engine_options=options) as ask:
            served = ask(0, 5).then(ask(5, N))  # one engine answers in parts
    finally:
        cleanup_dist_env_and_memory()
    expected = answers.solve(
        AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        AutoTokenizer.from_pretrained(source),
        task,
        problems,
        split=answers.HeadSplit(split.allocation.full, *split.span),
        sampling=SAMPLING,
    )
    assert list(served.correct) == expected.correct
    assert served.mean_output_tokens == expected.mean_output_tokens
    assert served.p95_output_tokens == expected.p95_output_tokens
    assert served.capped_share == expected.capped_share
    assert 0 < served.capped < N  # the cap was reached, and not by all
    assert served.seconds > 0
