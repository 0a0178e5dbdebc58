"""Results of long work, written as they come and continued by the same command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object, write_bytes_atomic


class Store:
    """A JSON file of results, guarded by the settings that decide them.

    The file holds ``{"format": ..., "settings": {...}, **content}``. Every `save` replaces it
    atomically, so that a killed job continues from its last result.

    Args:
        path: of the file.
        format: of the file, e.g. ``"rlkv bench 1"``; a file without one may be continued, too.
        settings: plain JSON values. A file with other values is refused, never overwritten.
        fresh: ignore what the file holds.
        is_writer: False in processes that only read; their `save` does nothing.
        flag: what names the file on the command line, for errors; "" for a file of a folder.
        fix: what the user can do about a file that cannot be continued.

    Attributes:
        settings: as JSON gives them back: tuples are lists.
        content: what the file holds beside format and settings; change it, then `save`.

    Raises:
        RlkvError: the file is of another kind, of other settings, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        settings: Mapping[str, Any],
        *,
        fresh: bool = False,
        is_writer: bool = True,
        flag: str = "--output",
        fix: str = "name another file, or overwrite it with --fresh",
    ) -> None:
        self.path = path
        self._format, self._is_writer = format, is_writer
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.content: dict[str, Any] = {}
        if fresh or not path.exists():
            return
        where = f"{flag} {one_line(path)}".strip()
        try:
            stored = read_json_object(path)
        except RlkvError as error:
            raise RlkvError(f"{flag} {error}; or {fix}".strip()) from error
        if stored.pop("format", format) != format or not isinstance(stored.get("settings"), dict):
            raise RlkvError(f"{where}: exists and is no file of `{format}`: {fix}")
        found = differences(stored.pop("settings"), self.settings)
        if found:
            raise RlkvError(f"{where}: has other settings ({'; '.join(found)}): {fix}")
        self.content = stored

    def text(self) -> str:
        """The file as `save` writes it."""
        content = {"format": self._format, "settings": self.settings, **self.content}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def save(self, others: Mapping[Path, bytes] | None = None) -> None:
        """Write the file, and `others` with it; if one cannot be written, none is."""
        if self._is_writer:
            write_bytes_atomic({**(others or {}), self.path: self.text().encode()})


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two nested settings, in words; keys of `wanted` only."""
    found = []
    for key, value in wanted.items():
        old = stored.get(key)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            found += [f"{one_line(key)}.{text}" for text in differences(old, value)]
        else:
            found.append(f"{one_line(key)} {_shown(old)} there, {_shown(value)} here")
    return found


def _shown(value: object) -> str:
    return one_line(json.dumps(value), 24)
