"""Which checkpoints of a training job are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object, write_text_atomic

COMPLETE_FILE = "complete.json"


def mark_complete(folder: Path, step: int) -> None:
    """Record that a checkpoint is written to its end, with the hash of each of its files."""
    files = {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE_FILE
    }
    write_text_atomic(folder / COMPLETE_FILE, json.dumps({"step": step, "files": files}) + "\n")


def last_checkpoint(output: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest whole checkpoint; `say` hears of the newer ones and what is wrong with them.

    None if no checkpoint was ever written to its end, an `RlkvError` if none of those is whole.
    """
    found = [folder for folder in output.glob("checkpoint-*") if folder.name[11:].isdigit()]
    faults = []
    for folder in sorted(found, key=lambda folder: int(folder.name[11:]), reverse=True):
        if not (folder / COMPLETE_FILE).exists():
            say(f"{folder.name} is not used: it was not written to its end")
            continue
        reason = _fault(folder)
        if reason is None:
            return folder
        faults.append(f"{folder.name}: {reason}")
        say(f"{folder.name} is not used: {reason}")
    if faults:
        raise RlkvError(
            f"--resume: {one_line(output)}: no checkpoint is whole ({'; '.join(faults)}): delete "
            "the checkpoint-* folders in it to train from the first step, or restore their files"
        )
    return None


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was written to its end."""
    try:
        files = read_json_object(folder / COMPLETE_FILE).get("files", {})
    except RlkvError:
        return f"{COMPLETE_FILE} is empty or cut off"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{one_line(name)} is missing"
        if _sha256(path) != digest:
            state = "cut off or changed" if path.stat().st_size else "empty"
            return f"{one_line(name)} is {state}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
