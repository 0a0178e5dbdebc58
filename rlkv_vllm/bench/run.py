"""One benchmark: from options to engines, results and report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.solve import Solve
from rlkv_vllm.bench.record import Record
from rlkv_vllm.bench.report import figure, markdown
from rlkv_vllm.bench.runner import Job, Runner, describe_point
from rlkv_vllm.bench.target import (
    SOLVE_MAX_MODEL_LEN,
    SOLVE_MEMORY,
    Options,
    Target,
    find_target,
)
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.models import MODEL_NAME
from rlkv_vllm.profile.plot import save_figure

MAIN = "model"
#: The embedded reasoner with a cache for a few answers, whatever model is measured else.
REASONER = "reasoner"


def run(
    options: Options,
    cases: Sequence[str],
    *,
    rounds: int,
    stem: Path,
    fresh: bool,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Measure what is missing and write the report.

    Args:
        options: of the model.
        cases: names in `CASES`; empty: all.
        rounds: turns of each variant.
        stem: the files are this with .json, .md and .png.
        fresh: measure all again.
        command: how to repeat it, for the report.
        say: prints a line of progress.

    Returns:
        The files written.

    Raises:
        RlkvError: something is wrong with what was given, or an engine failed.
    """
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise RlkvError(f"--cases {','.join(unknown)}: choose of {', '.join(CASES)}")
    chosen = [kind() for name, kind in CASES.items() if not cases or name in cases]
    json_path, text_path, picture_path = (
        stem.with_name(stem.name + suffix) for suffix in (".json", ".md", ".png")
    )
    with tempfile.TemporaryDirectory() as name:
        targets: dict[str, Target] = {}

        def target_of(case_name: str) -> Target:
            solves_embedded = case_name == Solve.name and options.task == MODEL_NAME
            key = REASONER if solves_embedded else MAIN
            if key not in targets:
                chosen_options = _reasoner(options) if solves_embedded else options
                targets[key] = find_target(key, chosen_options, Path(name))
            return targets[key]

        jobs: list[Job] = []
        too_large: dict[str, list[str]] = {}
        for case in chosen:
            target = target_of(case.name)
            points = []
            for point in case.points(target.setup, full=options.full):
                reason = case.too_large(target.setup, point)
                if reason is None:
                    points.append(point)
                else:
                    words = f"{describe_point(case, point)} ({reason})"
                    too_large.setdefault(case.name, []).append(words)
            jobs.append(Job(case, target, points))
        settings = {
            "commands": [command],
            "targets": {key: target.describe() for key, target in targets.items()},
            "too_large": too_large,
        }
        record = Record(json_path, settings, fresh=fresh)
        stem.parent.mkdir(parents=True, exist_ok=True)
        runner = Runner(record, rounds, _free_bytes(options.is_cuda), stem.parent, say)
        try:
            runner.run(jobs)
        finally:
            written = _write_report(record, json_path, text_path, picture_path)
    return written


def _write_report(record: Record, json_path: Path, text: Path, picture: Path) -> list[Path]:
    """Of what was measured so far."""
    if not record.results:
        return []
    drawing = figure(record.content)
    if drawing is not None:
        save_figure(drawing, picture)
    write_text_atomic(text, markdown(record.content, picture.name if drawing else None))
    return [json_path, text, *([picture] if drawing else [])]


def _reasoner(options: Options) -> Options:
    """The embedded reasoner, served as it is served by default."""
    own = options.model == MODEL_NAME
    return replace(
        options,
        model=MODEL_NAME,
        profile=options.profile if own else None,
        sparsity=options.sparsity if own else None,
        sink=options.sink if own else None,
        window=options.window if own else None,
        dtype=options.dtype if own else None,
        memory_bytes=SOLVE_MEMORY,
        max_model_len=SOLVE_MAX_MODEL_LEN,
    )


def _free_bytes(is_cuda: bool) -> int:
    """Memory that engines can have."""
    if is_cuda:
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free)
    import psutil

    return int(psutil.virtual_memory().available)
