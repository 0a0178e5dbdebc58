"""Problems of a Hugging Face data set, or of a local folder or file that `datasets` reads."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks.rows import Columns, RowsTask, UnusableAnswer, UnusablePrompt

PREFIX = "datasets:"

#: What `load_dataset` calls the reader of a file, by its suffix.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def read_dataset_task(name: str, split: str, columns: Columns) -> RowsTask:
    """The task of a data set; rows that cannot be used are skipped.

    `name` is `ORG/NAME` or `ORG/NAME/CONFIG` on the Hugging Face hub, or the path of a local folder
    or file; `split` as `load_dataset` takes it, slices such as `train[:1000]` included.

    Raises:
        RlkvError: it cannot be loaded, lacks a column or holds no problem.
    """
    where = f"task {PREFIX}{one_line(name)}"
    if find_spec("datasets") is None:
        raise RlkvError(f"{where}: datasets is not installed: run `pip install 'rlkv-vllm[train]'`")
    local = _local_path(name)
    rows = _load(where, name, split, local)
    where = f"{where} (split {split})"
    columns.require(where, rows.column_names)

    usable: list[int] = []
    skipped: list[str] = []
    wanted = rows.select_columns(list(dict.fromkeys((columns.prompt, columns.answer))))
    only = Columns(columns.prompt, columns.answer)
    for index, row in enumerate(wanted):
        try:
            only.problem(row)
        except (UnusableAnswer, UnusablePrompt) as error:
            skipped.append(f"row {index}: {error}")
        else:
            usable.append(index)

    # Not the path: the name is published in profiles.
    published = name if local is None else local.stem
    return RowsTask(
        published, where, len(usable), lambda i: columns.problem(rows[usable[i]]), skipped
    )


def _local_path(name: str) -> Path | None:
    """The path if `name` is one, None if it is a name on the hub."""
    path = Path(os.path.expanduser(name))
    looks_local = name.startswith((".", "/", "~")) or path.suffix in _READERS
    return path if looks_local or (name.strip() and path.exists()) else None


def _load(where: str, name: str, split: str, local: Path | None) -> Any:
    parts = name.split("/", 2)
    if local is not None and not local.exists():
        raise RlkvError(f"{where}: no such file or folder: check the path")
    if local is not None and local.is_file() and local.suffix not in _READERS:
        raise RlkvError(
            f"{where}: not a file that can be read: give one of {', '.join(_READERS)}, or a folder"
        )
    if local is None and not all(part.strip() for part in parts):
        raise RlkvError(
            f"{where}: not a name: give ORG/NAME or ORG/NAME/CONFIG on the Hugging Face hub, or a "
            "local path"
        )
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    from datasets.utils import are_progress_bars_disabled

    quiet = are_progress_bars_disabled()
    try:
        if local is None:
            config = parts[2] if len(parts) == 3 else None
            return load_dataset("/".join(parts[:2]), config, split=split)
        # Local files are read fast, and the bars would break our own lines.
        disable_progress_bars()
        if local.is_file():
            return load_dataset(_READERS[local.suffix], data_files=str(local), split=split)
        return load_dataset(str(local), split=split)
    except ConnectionError as error:
        raise RlkvError(
            f"{where}: the Hugging Face hub cannot be reached ({one_line(error)}): check the "
            "network, or download the data set and give its folder"
        ) from error
    except Exception as error:  # readers and network libraries have their own
        raise RlkvError(
            f"{where} (split {one_line(split)}): cannot be loaded ({one_line(error, 300)}): check "
            "the name (ORG/NAME or ORG/NAME/CONFIG, or a local path) and split"
        ) from error
    finally:
        if not quiet:
            enable_progress_bars()
