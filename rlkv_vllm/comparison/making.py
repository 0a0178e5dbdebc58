"""Makes the profile of a method: by a scorer, or by refinement of another method's profile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm.comparison.config import CompareConfig, Method
from rlkv_vllm.comparison.cost import FORMAT, Meter, cost_file
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report
from rlkv_vllm.files import one_line
from rlkv_vllm.options import validate
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.profile.io import load_profile, save_profile
from rlkv_vllm.scorers import get_scorer
from rlkv_vllm.scorers.run import ScoreConfig, make_profile
from rlkv_vllm.store import Store

if TYPE_CHECKING:
    from rlkv_vllm.search.config import RefineConfig

_DOCS = "docs/find-heads.md"


def profile_path(config: CompareConfig, method: Method, model: str, seed: int | None) -> Path:
    """The file of a method's profile: in the output folder, or where the pattern says."""
    if method.pattern is not None:
        return method.path(model, seed)
    return config.output / model / f"{method.label}-s{seed}.json"


def check_settings(config: CompareConfig, method: Method) -> None:
    """Refuse wrong settings of a method before anything is made."""
    if method.scorer is not None:
        get_scorer(method.scorer).settings(method.settings)
    elif method.start is not None:
        _refinement(config, method, next(iter(config.models)), config.seeds[0])


def make(
    config: CompareConfig,
    method: Method,
    model: str,
    seed: int,
    facts: dict[str, Any],
    report: Report,
    say: Callable[[str], None],
) -> HeadProfile:
    """The profile of a method, made now or by an earlier command; its cost is noted beside it.

    `facts` are plain values that decide the profile, beside the settings of the method: a file
    that was made with others is refused.
    """
    path = profile_path(config, method, model, seed)
    settings = {**facts, "method": method.scorer or method.start, "settings": method.settings}
    if method.start is not None:
        at = _start(config, method, model, seed)
        settings |= {"start": load_profile(at).sha256(), "sparsities": config.sparsities}
    store = Store(
        cost_file(path),
        FORMAT,
        settings,
        flag="",
        fix="choose another --output, or delete the file and its profile",
    )
    if path.exists() and store.content.get("is_finished"):
        return load_profile(path)

    if method.scorer == "rlkv":  # else the first seed alone would bear the imports
        importlib.import_module("rlkv_vllm.training.trainer")
    meter = Meter(store)

    def on_progress(stage: str, done: int, total: int, state: str = "") -> None:
        meter.tick()
        report(stage, done, total, state)

    if method.scorer is not None:
        work = path.with_name(f"{path.name}.work.json")
        wanted = _scoring(config, method, model, seed)
        profile = make_profile(wanted, on_progress, say, work=work)
        work.unlink(missing_ok=True)
    else:
        profile = _refined(_refinement(config, method, model, seed), on_progress, say)
    save_profile(profile, path)
    meter.note(is_finished=True)
    return profile


def _scoring(config: CompareConfig, method: Method, model: str, seed: int) -> ScoreConfig:
    assert method.scorer is not None
    return ScoreConfig(
        model=config.models[model],
        method=method.scorer,
        task=config.task,
        n=config.score_n,
        seed=seed,
        sink=config.sink,
        window=config.window,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        settings=method.settings,
        **config.sampling,
    )


def _refinement(config: CompareConfig, method: Method, model: str, seed: int) -> RefineConfig:
    from rlkv_vllm.search.config import RefineConfig

    content: dict[str, Any] = {
        "profile": str(_start(config, method, model, seed)),
        "model": config.models[model],
        "output": str(config.output / model / f"{method.label}-s{seed}"),
        "task": {"name": config.task},
        "seed": seed,
        "sink": config.sink,
        "window": config.window,
        "sampling": {"max_tokens": config.max_new_tokens, **config.sampling},
        "search": {"sparsities": list(config.sparsities)},
        "evaluation": {"problems": 0},
    }
    return validate(RefineConfig, _merged(content, method.settings), f"--set {method.label}", _DOCS)


def _start(config: CompareConfig, method: Method, model: str, seed: int) -> Path:
    """The file of the profile that is refined."""
    assert method.start is not None
    return profile_path(config, config.methods[method.start], model, seed)


def _merged(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with the changed ones in place of theirs."""
    result = dict(content)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[key] = value
    return result


def _refined(job: RefineConfig, report: Report, say: Callable[[str], None]) -> HeadProfile:
    from rlkv_vllm.search.job import run
    from rlkv_vllm.training.run import Listener

    # Its folder is part of the comparison: what an interruption left there is continued.
    profile = run(job, resume=True, listener=Listener(report, say=say))
    if profile is None:
        raise RlkvError(
            f"{one_line(job.output)}: refined by another process: run `rlkv compare` without "
            "accelerate launch"
        )
    return profile
