"""One benchmark: from options to engines, results and report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.solve import Solve
from rlkv_vllm.bench.engine import free_bytes
from rlkv_vllm.bench.record import Record
from rlkv_vllm.bench.report import figure, markdown, summary
from rlkv_vllm.bench.runner import Job, Runner, describe_point
from rlkv_vllm.bench.target import Options, Target, find_target
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.models import MODEL_NAME
from rlkv_vllm.profile.plot import save_figure

MAIN = "model"
#: The embedded reasoner with a cache for a few answers, whatever model the other cases measure.
REASONER = "reasoner"
REASONER_MEMORY, REASONER_MAX_MODEL_LEN = 8 * 2**20, 1024


def run(
    options: Options,
    cases: Sequence[str],
    *,
    rounds: int,
    stem: Path,
    fresh: bool,
    command: str,
    say: Callable[[str], None],
) -> tuple[list[Path], list[tuple[str, ...]]]:
    """Measure what is missing, or everything if `fresh`; write the report.

    Returns its files, `stem` with .json, .md and .png, and its `summary`. No `cases` are all of
    them, with `rounds` turns of each variant; `command` is how to repeat them, for the report.

    Raises:
        RlkvError: an option is wrong, or an engine failed.
    """
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise RlkvError(f"--cases {','.join(unknown)}: choose of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        targets: dict[str, Target] = {}
        jobs: list[Job] = []
        too_large: dict[str, list[str]] = {}
        for case in (kind() for name, kind in CASES.items() if not cases or name in cases):
            solves_embedded = case.name == Solve.name and options.task == MODEL_NAME
            key = REASONER if solves_embedded else MAIN
            if key not in targets:
                own = _reasoner(options) if solves_embedded else options
                targets[key] = find_target(key, own, Path(folder))
            setup, points = targets[key].setup, []
            for point in case.points(setup, full=options.full):
                if reason := case.too_large(setup, point):
                    words = f"{describe_point(case, point)} ({reason})"
                    too_large.setdefault(case.name, []).append(words)
                else:
                    points.append(point)
            jobs.append(Job(case, targets[key], points))
        record = Record(
            _beside(stem, ".json"),
            {key: target.describe() for key, target in targets.items()},
            too_large=too_large,
            command=command,
            fresh=fresh,
        )
        stem.parent.mkdir(parents=True, exist_ok=True)
        runner = Runner(record, rounds, free_bytes(options.is_cuda), stem.parent, say)
        try:
            runner.run(jobs)
        finally:
            written = _write_report(record, stem)
    return written, summary(record.content)


def _write_report(record: Record, stem: Path) -> list[Path]:
    if not record.results:
        return []
    written, picture = [_beside(stem, ".json"), _beside(stem, ".md")], _beside(stem, ".png")
    plot = figure(record.content)
    if plot is not None:
        save_figure(plot, picture)
    write_text_atomic(written[1], markdown(record.content, picture.name if plot else None))
    return [*written, picture] if plot else written


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _reasoner(options: Options) -> Options:
    """The embedded reasoner, with its defaults where another model is measured."""
    if options.model != MODEL_NAME:
        given: dict[str, Any] = dict.fromkeys(("profile", "sparsity", "sink", "window", "dtype"))
        options = replace(options, model=MODEL_NAME, **given)
    return replace(options, memory_bytes=REASONER_MEMORY, max_model_len=REASONER_MAX_MODEL_LEN)
