"""Models to score or to train gates of."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.models import load_model_fingerprint, model_source
from rlkv_vllm.profile import ModelFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelFingerprint]:
    """A model in evaluation mode, its tokenizer, and its fingerprint.

    Args:
        name: `embedded`, a model folder, or `org/name` on the Hugging Face hub.
        revision: commit, branch or tag of a model on the hub.
        dtype: "auto" is float32 on the CPU, where bfloat16 is slow, else the checkpoint's.
        device: None is the GPU if there is one.

    Raises:
        RlkvError: if it cannot be loaded or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():  # a bar in a file is carriage returns
        disable_progress_bar()
    source = model_source(name)
    fingerprint = load_model_fingerprint(name, revision)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=fingerprint.revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=fingerprint.revision, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise RlkvError(
            f"model {one_line(name)}: cannot be loaded ({one_line(error)}): give a Hugging Face "
            "decoder with weights and tokenizer"
        ) from error
    if tokenizer.chat_template is None:
        raise RlkvError(
            f"model {one_line(name)}: its tokenizer has no chat template: give a chat model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer, fingerprint


def set_threads(threads: int) -> None:
    """Set PyTorch's CPU threads; one is often best for small models and shared cores."""
    torch.set_num_threads(threads)
