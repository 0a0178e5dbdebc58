"""How answers of a model are sampled where the user does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import choose_sampling
from tests.support.profiles import assert_one_line, make_model_dir

CONFIG = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}


@pytest.fixture
def model(tmp_path: Path) -> str:
    make_model_dir(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "expected", "why"),
    [
        (
            {"top_p": None},
            {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05},
            "generation_config.json of the model",
        ),
        (
            {"temperature": 1.0},
            {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.05},
            "--temperature; else generation_config.json of the model",
        ),
        # Nothing of the file is left in a greedy row.
        ({"temperature": 0.0}, {"temperature": 0.0}, "--temperature 0"),
        (
            {"temperature": 0.0, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2},
            "--temperature 0",
        ),
        (
            {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.0},
            {"temperature": 0.9, "top_p": 0.8},
            "--temperature, --top-p, --repetition-penalty",
        ),
    ],
)
def test_given_parameters_win(
    given: dict[str, Any], expected: dict[str, Any], why: str, model: str
) -> None:
    sampling, reason = choose_sampling(model, given, max_tokens=9, seed=3)
    assert sampling == Sampling(max_tokens=9, seed=3, **expected)
    assert reason == why


def test_a_model_that_does_not_say_to_sample_is_greedy(tmp_path: Path) -> None:
    make_model_dir(tmp_path / "model")
    for config in (None, {}, {"do_sample": False, "temperature": 0.6}):
        if config is not None:
            path = tmp_path / "model" / "generation_config.json"
            path.write_text(json.dumps(config))
        sampling, why = choose_sampling(str(tmp_path / "model"), {}, max_tokens=9)
        assert sampling == Sampling(max_tokens=9, temperature=0)
        assert why == "generation_config.json of the model does not say to sample"
    with pytest.raises(RlkvError) as error:
        choose_sampling(str(tmp_path / "model"), {"top_k": 5}, max_tokens=9, prefix="sampling.")
    assert_one_line(error.value, "sampling.top_k: greedy", "sampling.temperature above 0")
    with pytest.raises(RlkvError) as error:
        choose_sampling(str(tmp_path / "model"), {}, max_tokens=9, samples=4)
    assert_one_line(error.value, "--samples 4: greedy", "--temperature above 0")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"top_p": 1.5}, "generation_config.json: top_p 1.5"),
        ({"temperature": "warm"}, "generation_config.json has temperature 'warm'"),
    ],
)
def test_a_bad_file_is_named(config: dict[str, Any], words: str, model: str) -> None:
    path = Path(model) / "generation_config.json"
    path.write_text(json.dumps(CONFIG | config))
    with pytest.raises(RlkvError) as error:
        choose_sampling(model, {}, max_tokens=9)
    assert_one_line(error.value, words)
