"""The served engine on a GPU: every token against the oracle, with what the scheduler does.

A small random model with CUDA graphs, chunked prefill, prefix caching, asynchronous scheduling
(CUDA's default) and a pool that is too small. Each engine runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.parity import Difference

IMPLEMENTATIONS = {
    "split": "SplitCUDAImpl",
    "gated": "GatedCUDAImpl",
    "stock": "TritonAttentionImpl",
}

Measure = Callable[..., "Difference"]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Compares an engine with the oracle, by kind, type and graphs."""
    from tests.support import parity  # torch and transformers: not where all is skipped

    models: dict[str, Path] = {}

    def measure(kind: str, dtype: str, graphs: str, **options: Any) -> Difference:
        if dtype not in models:
            models[dtype] = parity.make_model(tmp_path_factory.mktemp("model") / dtype, dtype)
        compilation = {"mode": 3 if "PIECEWISE" in graphs else 0, "cudagraph_mode": graphs}
        found = parity.run(
            models[dtype],
            kind,
            parity.GPU_SIZE,
            tmp_path_factory.mktemp("profile"),
            dtype=dtype,
            block_size=16,
            enforce_eager=False,
            compilation_config=compilation,
            **options,
        )
        assert found.result.implementation == IMPLEMENTATIONS[kind]
        assert found.cached > 0
        assert found.result.preemptions > 0
        assert found.result.chunks > 0
        assert found.result.restored
        difference = parity.compare(found)
        print(f"{kind} {dtype} {graphs}: {difference}")
        return difference

    return measure


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [
        ("split", "FULL_DECODE_ONLY"),
        ("split", "FULL"),  # mixed batches in graphs
        ("split", "FULL_AND_PIECEWISE"),  # with Inductor: vLLM's own default
        ("gated", "FULL_DECODE_ONLY"),
    ],
)
def test_float32_answers_as_the_oracle(kind: str, graphs: str, measure: Measure) -> None:
    found = measure(kind, "float32", graphs)
    # A choice between two tokens that are equal to float32's precision may go either way.
    assert found.loss < 1e-4, found
    assert found.logprob < 1e-3, found


def test_bfloat16_loses_no_more_than_stock(measure: Measure) -> None:
    split = measure("split", "bfloat16", "FULL_DECODE_ONLY")
    stock = measure("stock", "bfloat16", "FULL_DECODE_ONLY", attention_backend="TRITON_ATTN")
    # The worst of some thousand tokens is noisy: twice stock's is no sign of a mistake.
    assert split.loss <= 2 * stock.loss
    assert split.logprob <= 2 * stock.logprob
