"""Reading and writing head profiles."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from pydantic import ValidationError

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, parse_json_object, read_text, write_text_atomic
from rlkv_vllm.profile.schema import SCHEMA_VERSION, HeadProfile, ModelFingerprint


def load_profile(path: str | Path) -> HeadProfile:
    """Read and check a head profile.

    Raises:
        RlkvError: if the file is missing, unreadable, truncated, of an unknown
            `schema_version`, mis-shaped, or holds a value that is not allowed.
    """
    return _parse(path, read_text(path))


@functools.lru_cache(maxsize=8)  # a server reads its file for the early check, the plan, the proof
def _parse(path: str | Path, text: str) -> HeadProfile:
    raw = parse_json_object(path, text)
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


def check_matches(profile: HeadProfile, fingerprint: ModelFingerprint) -> None:
    """Refuse to use `profile` on a model of another architecture.

    Id and revision are not compared: a fine-tuned or moved copy keeps its heads (`is_made_for`).

    Raises:
        RlkvError: naming every field that differs.
    """
    model = fingerprint.model_dump(exclude={"id", "revision"})
    differing = [
        f"{name} is {one_line(getattr(profile.model, name), 40)} in the profile and "
        f"{one_line(value, 40)} in the model"
        for name, value in model.items()
        if getattr(profile.model, name) != value
    ]
    if differing:
        raise RlkvError(
            f"profile of {one_line(profile.model.id)} does not fit model "
            f"{one_line(fingerprint.id)}: {', '.join(differing)}: use a profile made for this "
            "model"
        )


def is_made_for(profile: HeadProfile, fingerprint: ModelFingerprint) -> bool:
    """Whether the ids name the same model; a local folder has no organisation."""
    ids = profile.model.id, fingerprint.id
    return len({name.rstrip("/").rpartition("/")[2].lower() for name in ids}) == 1
