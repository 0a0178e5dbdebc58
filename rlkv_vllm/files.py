"""Reading and writing small files.

Files may come from strangers: sizes are limited before parsing, nothing is unpickled, and every
problem becomes one `RlkvError` that names the file.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rlkv_vllm.errors import RlkvError

MAX_FILE_BYTES = 16 * 2**20
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


def write_bytes_atomic(files: Mapping[Path, bytes]) -> None:
    """Write all of `files` or, if any of them cannot be written, none.

    Each content goes to a temporary file beside its target and is fsynced before the first target
    is replaced. Missing folders are made. Symbolic links are followed. An `RlkvError` names the
    file that cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files.items():
            target = Path(os.path.realpath(path))
            if target.exists() and not target.is_file():
                raise RlkvError(f"{one_line(path)}: not a plain file: choose another output path")
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


def check_writable(flag: str, *paths: Path) -> None:
    """Check that `paths` can be written, before the work whose result they take.

    A temporary file is made and removed, because permission bits do not tell everything.

    Raises:
        RlkvError: naming the flag and the file that cannot be written.
    """
    for path in paths:
        target = Path(os.path.realpath(path))
        if os.path.isdir(target):
            raise RlkvError(f"{flag} {one_line(path)}: is a folder: name a file in it")
        if os.path.exists(target) and not os.path.isfile(target):
            raise RlkvError(f"{flag} {one_line(path)}: not a plain file: choose another file")
        try:
            # Folders that are missing are made when the file is written.
            with tempfile.TemporaryFile(dir=next(filter(os.path.lexists, target.parents))):
                pass
        except OSError as error:
            raise _cannot_write(f"{flag} {one_line(path)}", error) from error


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, or leave the file as it was."""
    write_bytes_atomic({Path(path): text.encode()})


def read_bytes(path: str | Path) -> bytes:
    """Read a plain file of at most `MAX_FILE_BYTES`; all else is an `RlkvError`."""
    path = Path(path)
    try:
        if not path.exists():
            raise RlkvError(f"{one_line(path)}: no such file: check the path")
        if not path.is_file():
            raise RlkvError(f"{one_line(path)}: not a plain file: give the path of a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
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
            f"{one_line(path)}: not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a file holding one JSON object.

    Stricter than `json.load`: no NaN or Infinity, no number too large for a float, no key
    given twice, limited size and depth.
    """
    return parse_json_object(path, read_text(path))


def parse_json_object(path: str | Path, text: str) -> dict[str, Any]:
    """As `read_json_object`, of a text that was read from `path`."""
    where = one_line(path)
    if text.startswith("\ufeff"):
        raise RlkvError(f"{where}: starts with a byte-order mark: save it as UTF-8 without one")

    def no_constant(name: str) -> NoReturn:
        raise RlkvError(f"{where}: holds {name}, which JSON does not allow: use a finite number")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise RlkvError(
                f"{where}: number {one_line(number)} is out of range: use a finite number"
            )
        return value

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RlkvError(f'{where}: key "{one_line(twice)}" is given twice: keep one of them')
        return result

    try:
        value = json.loads(
            text, parse_constant=no_constant, parse_float=finite, object_pairs_hook=no_duplicates
        )
    except RecursionError as error:
        raise RlkvError(f"{where}: nested too deeply to be a profile") from error
    except RlkvError:
        raise
    except ValueError as error:
        raise RlkvError(
            f"{where}: not valid JSON ({one_line(error)}): the file may be truncated; "
            "fetch or make it again"
        ) from error
    if not isinstance(value, dict):
        kind = "null" if value is None else f"a JSON {_JSON_NAMES[type(value)]}"
        raise RlkvError(f"{where}: holds {kind}, expected an object {{...}}: give the right file")
    return value


def printable(text: str) -> str:
    r"""`text` with an escape such as \x1b for every character that a terminal would obey."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def one_line(value: object, limit: int = 200) -> str:
    """`value` as printable text on one line, cut to `limit` characters."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error)


def _cannot_write(path: str | Path, error: OSError) -> RlkvError:
    return RlkvError(
        f"{one_line(path)}: cannot be written ({_reason(error)}): choose another output path"
    )
