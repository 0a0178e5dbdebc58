"""The scenarios of tests/gpu work: in toy size, on the CPU engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.parity import GATED, SPLIT, TOY_SIZE, compare, make_model, run


@pytest.mark.parametrize(
    ("kind", "implementation", "options"),
    [
        (SPLIT, "SplitCPUImpl", {"block_size": 16}),
        (GATED, "GatedCPUImpl", {"num_gpu_blocks_override": 12}),
    ],
)
def test_answers_as_the_oracle(
    kind: str, implementation: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "float32")
    found = run(model, kind, TOY_SIZE, tmp_path, **options)
    assert found.result.implementation == implementation
    assert found.cached > 0
    assert found.result.preemptions > 0
    assert found.result.chunks > 0
    assert found.result.restored
    difference = compare(found)
    assert difference.wrong == 0
    assert difference.logprob < 1e-4
    # The comparison sees what it is there for: an engine with other full heads, or other gates.
    other = replace(found, full_heads=((),) * 4, gates=found.gates[::-1])
    assert compare(other).wrong > 0
    assert compare(other).loss > 0.01
