"""Problems of a JSON-lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks.rows import Columns, RowsTask, UnusableAnswer, UnusablePrompt
from rlkv_vllm.tasks.task import Problem


def read_file_task(path: Path, columns: Columns) -> RowsTask:
    """The task of a file with one JSON object per line.

    Lines without a usable answer are skipped.

    Raises:
        RlkvError: the file is missing, holds no problem or a bad line.
    """
    problems: list[Problem] = []
    skipped: list[str] = []
    # Not splitlines: JSON texts may hold line separators other than line feeds.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _row(where, line)
        columns.require(where, row)
        try:
            problems.append(columns.problem(row))
        except UnusableAnswer as error:
            skipped.append(f"line {number}: {error}")
        except UnusablePrompt as error:
            raise RlkvError(f"{where}: {error}") from error
    return RowsTask(path.stem, str(path), len(problems), problems.__getitem__, skipped)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RlkvError(f"{path}: no such file: check the path of the task") from error
    except UnicodeDecodeError as error:
        raise RlkvError(f"{path}: not UTF-8 text (byte {error.start}): give JSON lines") from error
    except OSError as error:
        raise RlkvError(f"{path}: cannot be read ({error.strerror}): check the path") from error


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RlkvError(
            f"{where}: not valid JSON ({one_line(error)}): give one object per line"
        ) from error
    if not isinstance(row, dict):
        raise RlkvError(f"{where}: holds a JSON {type(row).__name__}, expected an object")
    return row
