"""Head profiles and model folders made for tests."""

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation import allocate
from rlkv_vllm.profile import EvaluationRow, HeadProfile, ModelFingerprint, Provenance
from rlkv_vllm.profile.schema import PairedCounts


def random_gates(layers: int, heads: int, seed: int = 0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(heads)] for _ in range(layers)]


def make_profile(layers: int = 4, heads: int = 2, **changes: Any) -> HeadProfile:
    fields: dict[str, Any] = {
        "model": ModelFingerprint(
            id="org/model",
            revision="abc",
            model_type="qwen3",
            num_layers=layers,
            num_query_heads=2 * heads,
            num_kv_heads=heads,
            head_dim=64,
        ),
        "gates": random_gates(layers, heads),
        "sink": 16,
        "window": 64,
        "provenance": Provenance(
            method="head-importance",
            source="https://example.org/paper",
            config={"steps": 3, "nested": {"list": [1, 2.5, None, "x"]}},
            seed=1,
            versions={"torch": "2.13"},
            created=date(2026, 1, 2),
            data="sums",
        ),
        "evaluation": [
            EvaluationRow(
                task="sums",
                n=100,
                sparsity=0.5,
                accuracy=0.95,
                full_accuracy=0.97,
                mean_output_tokens=80.5,
            )
        ],
        "recommended_sparsity": 0.5,
    }
    return HeadProfile(**(fields | changes))


def measured_row(
    sparsity: float,
    lost: int,
    gained: int = 0,
    n: int = 1000,
    *,
    profile: HeadProfile | None = None,
    tp_size: int = 1,
    span: tuple[int, int] | None = None,
    **changes: Any,
) -> EvaluationRow:
    """A row of `profile` as `rlkv eval` writes it: this many answers lost and gained of `n`."""
    profile = profile or make_profile()
    allocation = allocate(profile.gates, sparsity, tp_size)
    fields: dict[str, Any] = {
        "task": "sums",
        "n": n,
        "sparsity": sparsity,
        "accuracy": 0.5 + (gained - lost) / n,
        "full_accuracy": 0.5,
        "mean_output_tokens": 100.0,
        "full_mean_output_tokens": 100.0,
        "capped_share": 0.0,
        "full_capped_share": 0.0,
        "seed": 1,
        "allocation": allocation.digest(*(span or (profile.sink, profile.window))),
        "paired": PairedCounts(
            gained=gained, lost=lost, newly_cut=0, no_longer_cut=0, tokens_error=0.01
        ),
    }
    return EvaluationRow(**(fields | changes))


def make_model_dir(path: Path, layers: int = 4, heads: int = 2, **changes: Any) -> Path:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "hidden_size": 128 * heads,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def write_tsv(path: Path, gates: list[list[float]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(f"{g:.18e}" for g in row) + "\n" for row in gates))
    return path


def assert_one_line(error: BaseException, *parts: str) -> None:
    """The message is one printable line that names all `parts`."""
    message = str(error)
    assert message.isprintable(), message
    for part in parts:
        assert part in message, message
