"""From trained weights to a model folder with its measured accuracy."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.answers import Sampling
from rlkv_vllm.files import write_bytes_atomic
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.models import EMBEDDED_SPAN, MODEL_NAME
from rlkv_vllm.tasks import get_task
from rlkv_vllm.tasks.puzzles import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

MODEL_FILE, METRICS_FILE = "model.safetensors", "metrics.json"

#: The accuracy that bfloat16 weights must keep to be preferred.
_ENOUGH = 0.95
#: Where answers are cut off, in tokens: longer than any completion without errors, with room to
#: recover from errors in `audit`.
MAX_COMPLETION = {MODEL_NAME: 176, "audit": 1600}
_MEASURE_SEED = 20261123


def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    streaming: bool,
    family: str | None = None,
    n: int,
) -> dict[str, float]:
    """Share of fresh problems that the model solves greedily, and "output_tokens", their mean.

    The share is that of `family`; without one it is that of every family of the shipped model, and
    of all together ("embedded"). Either all heads are streaming heads or none is.
    """
    task = get_task(family or MODEL_NAME)
    none_full = HeadSplit([()] * model.config.num_hidden_layers, *EMBEDDED_SPAN)
    result = solve(
        model,
        tokenizer,
        task,
        task.problems(n, _MEASURE_SEED),
        split=none_full if streaming else None,
        sampling=Sampling(max_tokens=MAX_COMPLETION[task.name], temperature=0),
        batch_size=32,
    )
    marks = defaultdict(list)
    for i, correct in enumerate(result.correct):
        if family is None:
            marks[FAMILIES[i % len(FAMILIES)]].append(correct)
        marks[task.name].append(correct)
    shares = {name: round(sum(solved) / len(solved), 4) for name, solved in marks.items()}
    return {**shares, "output_tokens": round(result.mean_output_tokens, 1)}


def export(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    run: dict[str, Any],
    family: str | None,
    n: int,
) -> dict[str, Any]:
    """Measure the model and write it, in bfloat16 if that solves enough, else in float32.

    Returns what `metrics.json` holds, among it `run`: how the model came about.
    """
    model.eval()
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    exact = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        accuracy[str(dtype).removeprefix("torch.")] = {
            "full": measure(model, tokenizer, streaming=False, family=family, n=n),
            "streaming": measure(model, tokenizer, streaming=True, family=family, n=n),
        }
    if accuracy["bfloat16"]["full"][family or MODEL_NAME] < _ENOUGH:
        model.to(torch.float32)
        model.load_state_dict(exact)
    metrics = {
        "accuracy": accuracy,
        "n": n,
        "seed": _MEASURE_SEED,
        "sink": EMBEDDED_SPAN.sink,
        "window": EMBEDDED_SPAN.window,
        "weights": str(model.dtype).removeprefix("torch."),
        "run": run,
        "created": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        files = {output / path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    files[output / METRICS_FILE] = (json.dumps(metrics, indent=2) + "\n").encode()
    write_bytes_atomic(files)
    return metrics
