"""Import and export of gate files as published by the authors of RLKV and DuoAttention.

Both are tab-separated tables, one row per layer and one column per KV head:
`adapter_weights.tsv` (RLKV, https://arxiv.org/abs/2510.08525, without a config) and
`full_attention_heads.tsv` with `config.json` (DuoAttention, https://arxiv.org/abs/2410.10819).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.span import SERVING_SPAN, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object, read_text, write_bytes_atomic
from rlkv_vllm.profile.schema import HeadProfile, ModelFingerprint, Provenance

RLKV_FILE = "adapter_weights.tsv"
DUO_FILE = "full_attention_heads.tsv"
DUO_CONFIG = "config.json"

CLIP_TOLERANCE = 0.05  # bfloat16 training overshoots; the published files stay within 0.011

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def import_published(
    path: str | Path,
    model: ModelFingerprint,
    *,
    sink: int | None = None,
    window: int | None = None,
) -> HeadProfile:
    """Read a published gate file.

    Args:
        path: a `.tsv` file or its folder; DuoAttention's `config.json` beside it is read.
        model: the model that the gates belong to.
        sink: tokens; default: RLKV 16; DuoAttention `deploy_sink_size`, else `sink_size`.
        window: tokens; default: RLKV 64; DuoAttention `deploy_recent_size`, else `recent_size`.

    Raises:
        RlkvError: naming the file, row and column that cannot be used.
    """
    table = _find_table(Path(path))
    text = read_text(table)
    gates, clipped = _read_gates(table, text)
    if (len(gates), len(gates[0])) != (model.num_layers, model.num_kv_heads):
        raise RlkvError(
            f"{one_line(table)}: {len(gates)} layers x {len(gates[0])} KV heads, but --model "
            f"{one_line(model.id)} has {model.num_layers} x {model.num_kv_heads}: give the "
            "model that the file was made for"
        )
    config: dict[str, Any] = {}
    if table.name == DUO_FILE:
        method, source = "duo-attention", "https://arxiv.org/abs/2410.10819"
        config_file = table.with_name(DUO_CONFIG)
        if config_file.exists():
            config = read_json_object(config_file)
        sink = _tokens(config_file, config, "sink", sink)
        window = _tokens(config_file, config, "window", window)
    else:
        method, source = "rlkv", "https://arxiv.org/abs/2510.08525"
    span = resolve_span(sink, window, SERVING_SPAN)
    seed, data = config.get("seed"), config.get("dataset_name")
    return HeadProfile(
        model=model,
        gates=gates,
        sink=span.sink,
        window=span.window,
        provenance=Provenance(
            method=method,
            source=source,
            config={
                "imported_file": table.name,
                "imported_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "clipped_gates": clipped,
                "published_config": config,
            },
            seed=seed if type(seed) is int else None,
            versions={"rlkv_vllm": importlib.metadata.version("rlkv-vllm")},
            created=date.today(),
            data=data if isinstance(data, str) else None,
        ),
    )


def export_duo_attention(
    profile: HeadProfile, folder: str | Path, sparsity: float | None = None
) -> None:
    """Write `full_attention_heads.tsv` and `config.json` into `folder`, both or none.

    With a `sparsity` the gates become 1.0 for full and 0.0 for streaming heads at it, so that any
    threshold gives the same split.

    Raises:
        RlkvError: if `sparsity` is no share or the files cannot be written.
    """
    gates = profile.gates
    if sparsity is not None:
        heads = range(profile.model.num_kv_heads)
        gates = [[float(head in full) for head in heads] for full in allocate(gates, sparsity).full]
    rows = ("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in gates)
    config = {
        "model_name": profile.model.id,
        "sink_size": profile.sink,
        "recent_size": profile.window,
        "deploy_sink_size": profile.sink,
        "deploy_recent_size": profile.window,
        "dataset_name": profile.provenance.data,
        "seed": profile.provenance.seed,
        "sparsity": sparsity,
    }
    files = {DUO_FILE: "".join(rows), DUO_CONFIG: json.dumps(config, indent=2) + "\n"}
    write_bytes_atomic({Path(folder) / name: text.encode() for name, text in files.items()})


def _find_table(path: Path) -> Path:
    if not os.path.isdir(path):
        return path  # a missing file is reported when it is read
    found = [path / name for name in (RLKV_FILE, DUO_FILE) if (path / name).exists()]
    if len(found) == 1:
        return found[0]
    which, fix = f"both {RLKV_FILE} and {DUO_FILE}", "give the one to import"
    if not found:
        which = f"neither {RLKV_FILE} nor {DUO_FILE}"
        fix = "give the folder or the .tsv file of a published profile"
    raise RlkvError(f"{one_line(path)}: the folder has {which}: {fix}")


def _read_gates(table: Path, text: str) -> tuple[list[list[float]], int]:
    """Gates [layers][KV heads] clipped to [0, 1], and how many had to be clipped."""
    gates: list[list[float]] = []
    clipped = 0
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split()
        if not cells:
            continue
        row = []
        for column, cell in enumerate(cells, start=1):
            value = float(cell) if _NUMBER.fullmatch(cell) else math.nan
            if not -CLIP_TOLERANCE <= value <= 1 + CLIP_TOLERANCE:
                raise RlkvError(
                    f"{one_line(table)}: line {number}, column {column}: "
                    f"{one_line(cell, 40)} is no gate: numbers in [0, 1] are expected (up to "
                    f"{CLIP_TOLERANCE} outside is clipped)"
                )
            gate = min(max(value, 0.0), 1.0)
            clipped += gate != value
            row.append(gate)
        if gates and len(row) != len(gates[0]):
            raise RlkvError(
                f"{one_line(table)}: line {number} has {len(row)} columns, the lines before "
                f"have {len(gates[0])}: the file may be truncated; fetch it again"
            )
        gates.append(row)
    if not gates:
        raise RlkvError(f"{one_line(table)}: the file is empty: fetch it again")
    return gates, clipped


def _tokens(config_file: Path, config: dict[str, Any], flag: str, given: int | None) -> int:
    if given is not None:
        return given
    name = {"sink": "sink_size", "window": "recent_size"}[flag]
    for key in (f"deploy_{name}", name):
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or not (flag == "window") <= value < 2**31:
            raise RlkvError(
                f"{one_line(config_file)}: {key} {one_line(repr(value), 40)} is no number of "
                f"tokens: fix it or pass --{flag}"
            )
        return value
    raise RlkvError(
        f"{one_line(config_file)}: gives no {name}: pass --{flag} N (tokens to serve with)"
    )
