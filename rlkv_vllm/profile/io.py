"""Reading and writing head profiles and model fingerprints.

Everything read here may come from a stranger: sizes are limited before parsing, nothing is
unpickled, and whatever is wrong becomes one `RlkvError` that names the file and the field.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.schema import SCHEMA_VERSION, HeadProfile, ModelFingerprint

MAX_FILE_BYTES = 16 * 2**20

_ARCHITECTURE_FIELDS = (
    "model_type",
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "head_dim",
)


# --- files -----------------------------------------------------------------------------


def write_bytes_atomic(files: Mapping[Path, bytes]) -> None:
    """Write all of `files` or, if any of them cannot be written, none.

    Each content goes to a temporary file beside its target and is fsynced before the first
    target is replaced: only a target that cannot be replaced after all leaves those before it
    new. Missing folders are made. Symbolic links are followed.

    Raises:
        RlkvError: naming the file that cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files.items():
            target = Path(os.path.realpath(path))
            _raise_if_unwritable(path, target)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # os.open, unlike tempfile, gives the file the user's umask.
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                staged.append((temporary, target))
                with os.fdopen(handle, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise _cannot_write(path, error) from error
        for temporary, target in staged:
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise _cannot_write(target, error) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, or leave the file as it was.

    Raises:
        RlkvError: if the file cannot be written.
    """
    write_bytes_atomic({Path(path): text.encode()})


def read_bytes(path: str | Path) -> bytes:
    """Read a small file.

    Raises:
        RlkvError: if it is missing, no plain file, unreadable or over `MAX_FILE_BYTES`.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise RlkvError(f"{one_line(path)}: no such file: check the path")
        if not path.is_file():
            raise RlkvError(f"{one_line(path)}: not a plain file: give the path of a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RlkvError):
            raise
        raise RlkvError(
            f"{one_line(path)}: cannot be read ({_reason(error)}): check the path and its "
            "permissions"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise RlkvError(
            f"{one_line(path)}: larger than {MAX_FILE_BYTES // 2**20} MiB, which no profile "
            "is: give the right file"
        )
    return content


def read_text(path: str | Path) -> str:
    """Read a small UTF-8 file; errors as `read_bytes`."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise RlkvError(
            f"{one_line(path)}: not UTF-8 text (byte {error.start}): give a text file"
        ) from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a file holding one JSON object.

    Stricter than `json.load`: no NaN or Infinity, no number too large for a float, no key
    given twice, limited size and depth.

    Raises:
        RlkvError: naming the file and what is wrong.
    """
    return _parse_json_object(path, read_text(path))


def _parse_json_object(path: str | Path, text: str) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise RlkvError(
            f"{one_line(path)}: holds {name}, which JSON does not allow: use a finite number"
        )

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise RlkvError(
                f"{one_line(path)}: number {one_line(number)} is out of range: use a finite number"
            )
        return value

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RlkvError(
                f'{one_line(path)}: key "{one_line(twice)}" is given twice: keep one of them'
            )
        return result

    try:
        value = json.loads(
            text, parse_constant=no_constant, parse_float=finite, object_pairs_hook=no_duplicates
        )
    except RecursionError as error:
        raise RlkvError(f"{one_line(path)}: nested too deeply to be a profile") from error
    except ValueError as error:
        if isinstance(error, RlkvError):
            raise
        raise RlkvError(
            f"{one_line(path)}: not valid JSON ({one_line(error)}): the file may be truncated; "
            "fetch or make it again"
        ) from error
    if not isinstance(value, dict):
        raise RlkvError(
            f"{one_line(path)}: holds a JSON {type(value).__name__}, expected an object"
        )
    return value


# --- profiles --------------------------------------------------------------------------


def load_profile(path: str | Path) -> HeadProfile:
    """Read and check a head profile.

    Raises:
        RlkvError: if the file is missing, unreadable, truncated, of an unknown
            `schema_version`, mis-shaped, or holds a value that is not allowed.
    """
    text = read_text(path)
    raw = _parse_json_object(path, text)
    version = raw.get("schema_version")
    if type(version) is not int:
        raise RlkvError(
            f"{one_line(path)}: no integer schema_version, so this is no head profile: make one "
            "with `rlkv score`, or with `rlkv profile import` from a published format"
        )
    if version != SCHEMA_VERSION:
        raise RlkvError(
            f"{one_line(path)}: schema_version {one_line(version)} is unknown, this rlkv_vllm "
            f"reads {SCHEMA_VERSION}: install the version that wrote it, or make it again"
        )
    try:
        # From the text and not from `raw`: only JSON mode is strict and still reads dates.
        return HeadProfile.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise RlkvError(f"{one_line(path)}: {_first_error(error)}") from error


def save_profile(profile: HeadProfile, path: str | Path) -> None:
    """Write `profile` as JSON, one line of gates per layer, atomically.

    Raises:
        RlkvError: if the file cannot be written.
    """
    write_text_atomic(path, profile_text(profile))


def profile_text(profile: HeadProfile) -> str:
    """The file content of `profile`."""
    fields = []
    for key, value in profile.model_dump(mode="json").items():
        if key == "gates":
            rows = ",\n".join(json.dumps(row, allow_nan=False) for row in value)
            body = f"[\n{_indent(rows)}\n]"
        else:
            body = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        fields.append(_indent(f"{json.dumps(key)}: {body}"))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _indent(text: str) -> str:
    """Indent lines; unlike `textwrap.indent` only those that a line feed ends."""
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _first_error(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    first = details[0]
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
    ).lstrip(".")
    where = one_line(where, 80)
    message = one_line(first["msg"].removeprefix("Value error, "))
    if where:
        given = first["input"]
        shown = "" if isinstance(given, dict | list) else f" {one_line(repr(given), 60)}"
        message = f"{where}{shown}: {message}"
        if first["loc"][0] == "gates" and len(first["loc"]) == 3:
            message = (
                f"layer {first['loc'][1]}, KV head {first['loc'][2]}: {message}; a gate is a "
                "finite number in [0, 1]"
            )
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{message}{more}; the format is described by `rlkv profile schema`"


# --- model fingerprints ----------------------------------------------------------------


def fingerprint_from_config(
    config: Any, model_id: str, revision: str | None = None
) -> ModelFingerprint:
    """Read the architecture out of a Hugging Face model config.

    Args:
        config: the dict of a `config.json`, or an object with `to_dict()` (transformers'
            `PretrainedConfig`). A nested `text_config` (multimodal models) is followed.
        model_id: Hugging Face id or path, kept for the record.
        revision: commit or tag, kept for the record.

    Raises:
        RlkvError: naming the key that is missing or no positive integer.
    """
    if not isinstance(config, Mapping):
        to_dict: Callable[[], dict[str, Any]] = config.to_dict
        config = to_dict()
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
    """The `config.json` of a local model folder or a model on the Hugging Face hub.

    Args:
        model: a local folder, or `org/name` on the hub.
        revision: commit, branch or tag on the hub.

    Returns:
        The config, and the commit it came from (`revision` for a local folder).

    Raises:
        RlkvError: if there is no such model, it is offline and not cached, or the file is
            not valid JSON.
    """
    folder = _local_folder(model)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise RlkvError(
                f"model {one_line(model)}: the folder has no config.json: give a model folder "
                "in Hugging Face format"
            )
        return read_json_object(folder / "config.json"), revision
    from rlkv_vllm.profile import hub

    if not hub.is_repo_id(model):
        raise RlkvError(
            f"model {one_line(model)}: neither a folder nor an `org/name` on the Hugging Face "
            "hub: check the path"
        )
    path, commit = hub.download(model, "config.json", revision, what="model")
    return read_json_object(path), commit


def load_model_fingerprint(model: str, revision: str | None = None) -> ModelFingerprint:
    """Fingerprint of a local model folder or of a model on the hub.

    Raises:
        RlkvError: as `load_model_config` and `fingerprint_from_config`.
    """
    config, commit = load_model_config(model, revision)
    folder = _local_folder(model)
    # Where somebody's copy lies is nobody else's business: a local model is known by its name.
    name = model if folder is None else folder.resolve().name or model
    return fingerprint_from_config(config, name, commit)


def _local_folder(model: str) -> Path | None:
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def check_matches(profile: HeadProfile, fingerprint: ModelFingerprint) -> None:
    """Refuse to use `profile` on a model of another architecture.

    Id and revision are not compared: a fine-tuned or moved copy keeps its heads.

    Raises:
        RlkvError: naming every field that differs.
    """
    differing = [
        f"{name} {getattr(profile.model, name)} (model: {getattr(fingerprint, name)})"
        for name in _ARCHITECTURE_FIELDS
        if getattr(profile.model, name) != getattr(fingerprint, name)
    ]
    if differing:
        raise RlkvError(
            f"profile of {one_line(profile.model.id)} does not fit model "
            f"{one_line(fingerprint.id)}: {', '.join(differing)}: use a profile made for this "
            "model"
        )


# --- messages --------------------------------------------------------------------------


def one_line(value: object, limit: int = 200) -> str:
    """`value` as printable text on one line, cut to `limit` characters."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error)


def _cannot_write(path: Path, error: OSError) -> RlkvError:
    return RlkvError(
        f"{one_line(path)}: cannot be written ({_reason(error)}): choose another output path"
    )


def _raise_if_unwritable(path: Path, target: Path) -> None:
    if target.exists() and not target.is_file():
        raise RlkvError(f"{one_line(path)}: not a plain file: choose another output path")
