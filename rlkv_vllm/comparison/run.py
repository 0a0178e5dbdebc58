"""A comparison from beginning to end: profiles, answers, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.span import Span, resolve_span
from rlkv_vllm.answers import Sampling
from rlkv_vllm.comparison.config import CompareConfig, Method
from rlkv_vllm.comparison.cost import read_cost
from rlkv_vllm.comparison.making import check_settings, make, profile_path
from rlkv_vllm.comparison.measuring import load_answers, measure
from rlkv_vllm.comparison.record import Record, RunRow
from rlkv_vllm.comparison.report import summary, write_report
from rlkv_vllm.comparison.seen import seen_problems
from rlkv_vllm.comparison.tables import tables
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report
from rlkv_vllm.evaluation.splits import FULL
from rlkv_vllm.files import check_writable
from rlkv_vllm.hf.answers import HeadSplit
from rlkv_vllm.machine import describe_machine
from rlkv_vllm.models import choose_sampling, folder_digest, load_model_fingerprint, model_source
from rlkv_vllm.profile import HeadProfile, ModelFingerprint
from rlkv_vllm.profile.io import check_matches
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.tasks import Problem, Task, get_task, problems_digest, skip_note

RESULTS_FILE = "compare.json"


@dataclass(frozen=True)
class _Model:
    label: str
    name: str
    fingerprint: ModelFingerprint
    sampling: Sampling
    settings: dict[str, Any]  # that decide its answers


def run(
    config: CompareConfig,
    *,
    command: str,
    fresh: bool = False,
    report: Report = lambda stage, done, total, state="": None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Path], list[tuple[str, ...]]]:
    """Make what is to be made, measure what is not measured yet, or everything if `fresh`.

    Returns the files of results and report, and the report's `summary`. `command` is how to repeat
    it, for the report. An interrupted comparison continues with its last profile or measurement.

    Raises:
        RlkvError: if an option is wrong, a profile is missing or cannot be made, or the output
            folder holds another comparison; what was reached stays in `config.output`.
    """
    results = config.output / RESULTS_FILE
    check_writable("--output", results)
    task = get_task(config.task)
    if note := skip_note(task):
        say(note)
    problems = task.problems(config.n, config.problem_seed)
    models = [_model(config, label) for label in config.models]
    for method in config.methods.values():
        check_settings(config, method)
        for model in models:
            if method.pattern is not None:
                for seed in method.seeds(config.seeds):
                    _, path = _find(config, method, model, seed)
                    read_cost(path)  # refuses a wrong file
    record = Record(
        results,
        _settings(config, task, problems),
        {model.label: model.settings for model in models},
        asked={
            "models": list(config.models),
            "methods": list(config.methods),
            "reference": config.reference,
            "seeds": list(config.seeds),
            "sparsities": sorted({*config.sparsities}),
        },
        command=command,
        machine=describe_machine() | {"threads": torch.get_num_threads()},
        fresh=fresh,
    )
    try:
        for model in models:
            _compare(config, model, task, problems, record, report, say)
    finally:
        written = write_report(record, config.output)
    return [results, *written], summary(tables(record.content))


def _compare(
    config: CompareConfig,
    model: _Model,
    task: Task,
    problems: Sequence[Problem],
    record: Record,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Profiles and answers of one model."""
    runs = _runs(config, model, task, problems, report, say)
    record.set_runs(model.label, [row for row, _ in runs])
    fresh_ones = {*range(len(problems))}.difference(*(row["seen"] for row, _ in runs))
    if not fresh_ones:
        raise RlkvError(
            f"task {task.name}: profiles were made from all {len(problems)} problems: change "
            "--problem-seed or --n, or add problems"
        )
    measure(
        model.label,
        _wanted(model, runs),
        record,
        partial(
            load_answers,
            model.name,
            task,
            problems,
            model.sampling,
            config.samples,
            config.batch_size,
        ),
        report,
    )


def _model(config: CompareConfig, label: str) -> _Model:
    name = config.models[label]
    fingerprint = load_model_fingerprint(name)
    sampling, _ = choose_sampling(
        name,
        config.sampling,
        max_tokens=config.max_new_tokens,
        seed=config.problem_seed,
        samples=config.samples,
    )
    source = Path(model_source(name))
    version = folder_digest(source) if source.is_dir() else fingerprint.revision
    all_full = allocate([[1.0] * fingerprint.num_kv_heads] * fingerprint.num_layers, 0.0)
    settings = {
        "model": fingerprint.model_dump(mode="json", exclude={"revision"}),
        "version": version,
        "sampling": sampling.model_dump(mode="json"),
        "full_cache": all_full.digest(0, 1),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return _Model(label, name, fingerprint, sampling, settings)


def _settings(config: CompareConfig, task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
    versions = describe_machine()["versions"]
    return {
        "task": task.name,
        "n": len(problems),
        "samples": config.samples,
        "problem_seed": config.problem_seed,
        "problems": problems_digest(problems),
        "versions": {name: versions.get(name) for name in ("torch", "transformers")},
    }


def _find(
    config: CompareConfig, method: Method, model: _Model, seed: int | None
) -> tuple[HeadProfile, Path]:
    """The profile that the pattern of a method names, checked."""
    name = profile_path(config, method, model.label, seed)
    try:
        found = find_profile(str(name))
        check_matches(found[0], model.fingerprint)
    except RlkvError as error:
        raise RlkvError(f"--profile {method.label}={method.pattern}: {error}") from error
    return found


def _runs(
    config: CompareConfig,
    model: _Model,
    task: Task,
    problems: Sequence[Problem],
    report: Report,
    say: Callable[[str], None],
) -> list[tuple[RunRow, dict[str, HeadSplit]]]:
    """Every profile with its row of the record, and its split by sparsity."""
    facts = {
        "model": model.settings["model"],
        "version": model.settings["version"],
        "task": task.name,
        "n": config.score_n,
        "sampling": {k: v for k, v in model.settings["sampling"].items() if k != "seed"},
        "sink": config.sink,
        "window": config.window,
    }
    runs = []
    # Seed by seed: an interrupted comparison has all methods with some seeds.
    methods = [*config.methods.values()]
    ordered = [
        (method, seed)
        for place in range(len(config.seeds))
        for method in methods
        for seed in method.seeds(config.seeds)[place : place + 1]
    ]
    for place, (method, seed) in enumerate(ordered):
        name = method.label if seed is None else f"{method.label}, seed {seed}"
        path = profile_path(config, method, model.label, seed)
        if method.pattern is not None:
            profile, path = _find(config, method, model, seed)
        else:
            assert seed is not None
            on_part = partial(_report_part, report, model.label, name, (place, len(ordered)))
            profile = make(config, method, model.label, seed, facts, on_part, say)
        span = resolve_span(config.sink, config.window, Span(profile.sink, profile.window))
        allocations = {f"{s:g}": allocate(profile.gates, s) for s in sorted(config.sparsities)}
        row = {
            "method": method.label,
            "seed": seed,
            "sha256": profile.sha256(),
            **span._asdict(),
            **asdict(read_cost(path)),
            "seen": seen_problems(profile, task, problems),
            "full_heads": {share: one.full for share, one in allocations.items()},
            "digests": {share: one.digest(*span) for share, one in allocations.items()},
        }
        runs.append((row, {s: HeadSplit(a.full, *span) for s, a in allocations.items()}))
    return runs


def _report_part(
    report: Report,
    model: str,
    name: str,
    place: tuple[int, int],
    part: str,
    done: int,
    total: int,
    state: str = "",
) -> None:
    """Report the progress of the profile at `place` (of so many) as that of all."""
    words = ", ".join(filter(None, [f"{name}: {part} {done}/{total}", state]))
    hundredths = 100 * place[0] + 99 * done // max(1, total)
    report(f"{model}: profiles", hundredths, 100 * place[1], words)


def _wanted(
    model: _Model, runs: Sequence[tuple[RunRow, dict[str, HeadSplit]]]
) -> dict[str, tuple[str, HeadSplit | None]]:
    """Name and split of all distinct allocations by digest, that of the full cache first."""
    wanted: dict[str, tuple[str, HeadSplit | None]]
    wanted = {model.settings["full_cache"]: (FULL, None)}
    for row, splits in runs:
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        for share, split in splits.items():
            name = f"{row['method']}{seed} at {share}"
            wanted.setdefault(row["digests"][share], (name, split))
    return wanted
