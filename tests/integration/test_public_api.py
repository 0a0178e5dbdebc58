"""`LLM(model, **split(...))` and `prove(llm)`: the engine of `rlkv serve`, and nothing less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlkv_vllm import load_profile, prove, split
from rlkv_vllm.engine.cache.scheduler import SplitScheduler
from rlkv_vllm.engine.cpu.backend import SplitCPUBackend, SplitCPUImpl
from rlkv_vllm.engine.cpu.worker import SplitCPUWorker
from rlkv_vllm.engine.worker_extension import RlkvWorkerExtension
from rlkv_vllm.errors import RlkvError
from tests.integration.conftest import random_prompt
from tests.integration.test_parity import UNEVEN
from tests.support.engines import engine, generate, run_script, scheduler
from tests.support.oracle import count_differences

SINK, WINDOW = 16, 64


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def profile(model: Path, profile_of: Callable[..., Path]) -> Path:
    return profile_of(model, UNEVEN, sink=SINK, window=WINDOW)


def test_an_engine_made_with_split(model: Path, profile: Path) -> None:
    prompt = random_prompt(300, 1)
    with engine(model, **split(profile)) as llm:
        (report,) = prove(llm)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert type(scheduler(llm)) is SplitScheduler
        assert isinstance(worker, SplitCPUWorker)
        assert isinstance(worker, RlkvWorkerExtension)
        context = worker.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if hasattr(layer, "impl")]
        assert {type(layer.impl) for layer in layers} == {SplitCPUImpl}
        assert {layer.get_attn_backend() for layer in layers} == {SplitCPUBackend}
        outputs = generate(llm, [prompt], 40)
    assert report.profile_sha256 == load_profile(profile).sha256()
    assert report.full_heads == sum(map(len, UNEVEN))
    wrong, worst = count_differences(model, prompt, outputs[0].outputs[0], UNEVEN, SINK, WINDOW)
    assert wrong == 0
    assert worst < 1e-4


def test_a_stock_engine_is_not_proven(model: Path) -> None:
    with engine(model) as llm, pytest.raises(RlkvError, match="no entry 'rlkv'"):
        prove(llm)


_NOT_LOADED = """
import json, sys
from vllm import LLM
from rlkv_vllm import prove, split
from rlkv_vllm.errors import RlkvError

if __name__ == "__main__":
    model, profile = json.loads(sys.stdin.read())
    llm = LLM(model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
              max_model_len=512, kv_cache_memory_bytes=32 << 20, **split(profile))
    try:
        prove(llm)
    except RlkvError as error:
        print("RESULT", json.dumps(str(error)), flush=True)
"""


def test_an_engine_without_the_plugin_is_not_proven(
    model: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM starts it all the same, with full caches."""
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    said = run_script(_NOT_LOADED, tmp_path, [str(model), str(profile)], timeout=300)
    assert "attention layers keep full caches" in said
    assert "VLLM_PLUGINS" in said
