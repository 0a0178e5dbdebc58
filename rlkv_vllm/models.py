"""Models by name: the only place that knows the model `embedded`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object
from rlkv_vllm.profile import hub
from rlkv_vllm.profile.schema import HeadProfile, ModelFingerprint

#: Name of the model that is shipped with the package.
MODEL_NAME = "embedded"
#: The stock vLLM parser that separates `<think> ... </think>` from the answer.
REASONING_PARSER = "deepseek_r1"
#: Its defaults in `rlkv serve`: the precision it was measured in (vLLM's "auto" makes bfloat16 of
#: float32), and no compilation, which is no gain at its size.
_SERVING_DEFAULTS: dict[str, Any] = {
    "profile": MODEL_NAME,
    "served_model_name": [MODEL_NAME],
    "reasoning_parser": REASONING_PARSER,
    "dtype": "float32",
    "enforce_eager": True,
}
#: Cache of the embedded model in bytes: hundreds of its longest requests.
EMBEDDED_CACHE_BYTES = 256 * 2**20
#: Sink and window: a tenth of a sequence of 190 tokens.
EMBEDDED_SPAN = Span(4, 16)


def model_dir() -> Path:
    """The folder of the shipped weights, tokenizer and config; an `RlkvError` without weights."""
    folder = _embedded_folder()
    if not (folder / "model.safetensors").is_file():
        raise RlkvError(
            f"{folder}: no model.safetensors of the embedded reasoner: install the package "
            f"again, or make it with `rlkv testbed train --output {folder}`"
        )
    return folder


def _embedded_folder() -> Path:
    return Path(__file__).parent / "testbed" / "weights"


def model_source(name: str) -> str:
    """Where to load the model `name` from: a folder, or `org/name` on the hub."""
    return str(model_dir()) if name == MODEL_NAME else name


def is_embedded(model: str) -> bool:
    """Whether this name or folder is the shipped model."""
    return model == MODEL_NAME or Path(model).resolve() == _embedded_folder().resolve()


def fingerprint_from_config(
    config: Any, model_id: str, revision: str | None = None
) -> ModelFingerprint:
    """Read the architecture out of a Hugging Face model config; id and revision are for the record.

    The config is the dict of a `config.json` or transformers' `PretrainedConfig`. A nested
    `text_config` (multimodal models) is followed.

    Raises:
        RlkvError: naming the key that is missing or no positive integer.
    """
    if not isinstance(config, Mapping):
        config = config.to_dict()
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else config
    model_type = nested.get("model_type") or config.get("model_type")
    if not isinstance(model_type, str):
        raise RlkvError(
            f"model {one_line(model_id)}: config.json has no model_type: give a decoder model "
            "in Hugging Face format"
        )

    def count(key: str, default: int | None = None) -> int:
        value = nested.get(key)
        if value is None:
            value = default
        if type(value) is not int or not 1 <= value < 2**31:
            raise RlkvError(
                f"model {one_line(model_id)}: config.json has {key} {one_line(repr(value), 60)}, "
                "a positive integer is needed: give a decoder model in Hugging Face format"
            )
        return value

    query_heads = count("num_attention_heads")
    hidden = nested.get("hidden_size")
    return ModelFingerprint(
        id=model_id,
        revision=revision,
        model_type=model_type,
        num_layers=count("num_hidden_layers"),
        num_query_heads=query_heads,
        num_kv_heads=count("num_key_value_heads", query_heads),
        head_dim=count("head_dim", hidden // query_heads if type(hidden) is int else None),
    )


def load_model_config(model: str, revision: str | None = None) -> tuple[dict[str, Any], str | None]:
    """The `config.json` of a model, and the commit it came from (`revision` for a local folder).

    The model is `embedded`, a local folder, or `org/name` on the Hugging Face hub, of which the
    revision is a commit, branch or tag.

    Raises:
        RlkvError: there is no such model, it is offline and not cached, or no valid JSON.
    """
    folder = _local_folder(model_source(model))
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise RlkvError(
                f"model {one_line(model)}: the folder has no config.json: give a model folder "
                "in Hugging Face format"
            )
        return read_json_object(folder / "config.json"), revision
    if not hub.is_repo_id(model):
        raise RlkvError(
            f"model {one_line(model)}: neither a folder nor an `org/name` on the Hugging Face "
            "hub: check the path"
        )
    path, commit = hub.download(model, "config.json", revision, what="model")
    return read_json_object(path), commit


def load_model_fingerprint(model: str, revision: str | None = None) -> ModelFingerprint:
    """Fingerprint of a model; arguments and errors as of `load_model_config`."""
    config, commit = load_model_config(model, revision)
    folder = _local_folder(model)
    # The path of a local folder is private: the fingerprint has its name only.
    name = MODEL_NAME if is_embedded(model) else folder.resolve().name if folder else model
    return fingerprint_from_config(config, name or model, commit)


def model_of(profile: HeadProfile) -> str:
    """The model of a profile as a command takes it; its file may come from a stranger."""
    name = profile.model.id
    return name if name == MODEL_NAME or hub.is_repo_id(name) else "MODEL"


def evaluation_words(model: str) -> tuple[str, ...]:
    """How `rlkv eval` is given a model: its name, and problems that it can read."""
    if is_embedded(model):
        return (MODEL_NAME,)
    return model, "--task", "TASK"


def default_sampling(model: str, revision: str | None = None) -> dict[str, Any]:
    """The sampling parameters that `generation_config.json` of a model asks for.

    Fields of `rlkv_vllm.answers.Sampling`, which vLLM's server takes from the same file. Without
    the file, or where it does not say to sample, ``{"temperature": 0.0}``: greedy decoding.

    Raises:
        RlkvError: the file is no valid JSON, or a value is no number.
    """
    folder = _local_folder(model_source(model))
    if folder is not None:
        path = folder / "generation_config.json"
        config = read_json_object(path) if path.is_file() else {}
    elif hub.is_repo_id(model):
        found = hub.download_optional(model, "generation_config.json", revision, what="model")
        config = read_json_object(found) if found is not None else {}
    else:
        config = {}
    if not config.get("do_sample"):
        return {"temperature": 0.0}
    found_values: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RlkvError(
                f"model {one_line(model)}: generation_config.json has {name} "
                f"{one_line(repr(value), 40)}, a number is needed: correct the file, or give "
                "--temperature"
            )
        found_values[name] = value
    return found_values


def folder_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja") and path.is_file():
            with path.open("rb") as stream:
                digest.update(path.name.encode())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _local_folder(model: str) -> Path | None:
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def serving_defaults(model: str) -> dict[str, Any]:
    """Flags of `rlkv serve` for a model where the user does not give them."""
    return dict(_SERVING_DEFAULTS) if model == MODEL_NAME else {}


def default_cache_bytes(model: str) -> int | None:
    """Bytes of KV cache for a model where the user gives none; None: vLLM's choice."""
    return EMBEDDED_CACHE_BYTES if model == MODEL_NAME else None


def default_span(model: str, default: Span) -> Span:
    """Sink and window where the user gives none; `default` is that of other models."""
    return EMBEDDED_SPAN if model == MODEL_NAME else default


def choose_sampling(
    model: str,
    given: Mapping[str, Any],
    *,
    max_tokens: int,
    seed: int = 0,
    samples: int = 1,
    revision: str | None = None,
    prefix: str = "--",
) -> tuple[Sampling, str]:
    """How answers of a model are sampled, and why so: as `given`, the rest as `default_sampling`.

    Args:
        model: a name, folder or Hub id.
        given: parameters by the names of `Sampling`; None is not given.
        max_tokens: limit of an answer.
        seed: of the random numbers.
        samples: answers per problem.
        revision: of a model on the hub.
        prefix: of the parameters' names in errors: flags, or a section such as ``sampling.``.

    Raises:
        RlkvError: a parameter is out of range, or means nothing in greedy decoding.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    is_flag = prefix == "--"
    flags = {name: prefix + (name.replace("_", "-") if is_flag else name) for name in chosen}
    if chosen.get("temperature") == 0:
        defaults: dict[str, Any] = {}
        why = f"{flags['temperature']} 0"
    else:
        defaults = default_sampling(model, revision)
        why = "generation_config.json of the model"
        if defaults["temperature"] == 0:
            why = f"{why} does not say to sample"
    try:
        sampling = Sampling(max_tokens=max_tokens, seed=seed, **(defaults | chosen))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = flags.get(name, f"model {one_line(model)}: generation_config.json: {name}")
        raise RlkvError(f"{where} {one_line(first['input'], 40)}: {first['msg']}") from error
    if sampling.is_greedy:
        drawn = [flag for name, flag in flags.items() if name in ("top_p", "top_k", "min_p")]
        if samples > 1:
            drawn.append(f"{prefix}samples {samples}")
        if drawn:
            raise RlkvError(
                f"{', '.join(drawn)}: greedy decoding samples nothing ({why}): leave it out, or "
                f"give a {prefix}temperature above 0"
            )
    elif flags:
        rest = "" if defaults.keys() <= chosen.keys() else f"; else {why}"
        why = f"{', '.join(flags.values())}{rest}"
    return sampling, why
