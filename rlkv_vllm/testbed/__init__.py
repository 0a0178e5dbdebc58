"""The embedded reasoner: a small model that needs its chain of thought and its whole cache.

1.3 million parameters, four task families, weights shipped in the package. Small enough to
train in minutes on one core, hard enough that streaming heads break it: every step of its
chain of thought looks up a fact that lies far outside the window.
"""

from __future__ import annotations

from pathlib import Path

from rlkv_vllm.errors import RlkvError

#: What users call the model.
MODEL_NAME = "embedded"
#: The stock vLLM parser that separates `<think> ... </think>` from the answer.
REASONING_PARSER = "deepseek_r1"
#: Tokens that a streaming head keeps: a tenth of a sequence of 190 tokens.
SINK, WINDOW = 4, 16


def model_dir() -> Path:
    """The folder of the shipped weights, tokenizer and config.

    Raises:
        RlkvError: if the weights are missing from this installation.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model.safetensors").is_file():
        raise RlkvError(
            f"{folder}: no model.safetensors of the embedded reasoner: install the package again, "
            f"or make it with `rlkv testbed train --output {folder}`"
        )
    return folder


def model_source(name: str) -> str:
    """Where to load the model `name` from: the shipped weights for `MODEL_NAME`.

    Raises:
        RlkvError: as `model_dir`.
    """
    return str(model_dir()) if name == MODEL_NAME else name


def example_question() -> str:
    """A short problem for a first request; the same one every time."""
    from rlkv_vllm.testbed.problems import make_problems

    return make_problems("hops", 1, seed=0, scale=0.3)[0].prompt
