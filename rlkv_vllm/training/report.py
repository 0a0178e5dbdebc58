"""One HTML page about a run, with everything it needs inside: no scripts, nothing fetched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm.evaluation.plot import accuracy_figure
from rlkv_vllm.evaluation.rows import accuracy_interval
from rlkv_vllm.files import one_line, write_text_atomic
from rlkv_vllm.profile.plot import profile_figure
from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile
from rlkv_vllm.training import report_charts as charts
from rlkv_vllm.training.report_charts import data_uri
from rlkv_vllm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE, TEMPLATE = "report.html", "report.html.j2"
#: The heads of a run without a recommended sparsity are shown at this one.
DEFAULT_SPARSITY = 0.5
_REFINED = ("sparsity", "given", "found", "become_streaming", "become_full")
_CURRICULUM = {
    "tried": "problems tried",
    "kept": "kept: solved by the model with its full cache",
    "mean_tokens": "mean tokens of an answer",
    "capped_share": "share of the answers cut off",
    "longest": "tokens of the longest kept sample",
    "sha256": "SHA-256 of the kept set",
}


def write_report(run_dir: Path) -> Path:
    """Describe a run of `rlkv train` or `rlkv refine` in `report.html` of its folder.

    It shows what is there of the run and names what is missing: a run that was stopped, or whose
    profile was not evaluated, has a report too. Returns the file.

    Raises:
        RlkvError: if the folder holds nothing of a run, or the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = RunFolder(run_dir)
    profile = run.profile
    rows, best = (profile.evaluation, profile.recommended_sparsity) if profile else ([], None)
    tasks = list(dict.fromkeys((row.task, row.n) for row in rows))
    figures: dict[str, Figure | None] = {
        "accuracy": _accuracy(rows, tasks) if rows else None,
        "training": charts.curves_figure(run.metrics, charts.TRAINING_CURVES),
        "summary": charts.curves_figure(run.metrics, charts.GATE_CURVES),
        "gates": charts.gates_figure(run.gates) if run.gates else None,
        "heads": profile_figure(profile, best or DEFAULT_SPARSITY) if profile else None,
    }
    refined = run.refinement.get("rows")
    lines = run.config.split("\n")
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"number": _number, "heads": _heads, "interval": _interval_text}
    page = jinja.get_template(TEMPLATE).render(
        run=run,
        title=f"Head profile of {run.model} by {profile.provenance.method}"
        if profile
        else f"Run of {run.model or 'an unknown model'} by rlkv: no profile",
        byline=_byline(run, profile),
        rows=sorted(rows, key=lambda row: (tasks.index((row.task, row.n)), row.sparsity)),
        best=best,
        sparsity=best or DEFAULT_SPARSITY,
        figures={name: figure and data_uri(figure) for name, figure in figures.items()},
        refined=[
            dict.fromkeys(_REFINED) | row
            for row in (refined if isinstance(refined, list) else [])
            if isinstance(row, dict)
        ],
        curriculum=[
            (words, _plain(run.curriculum[key]))
            for key, words in _CURRICULUM.items()
            if run.curriculum.get(key) is not None
        ],
        comments=[line[1:].strip() for line in lines if line.startswith("#")],
        options="\n".join(line for line in lines if not line.startswith("#")).strip(),
        versions=profile
        and ", ".join(f"{name} {it}" for name, it in profile.provenance.versions.items()),
    )
    path = run_dir / REPORT_FILE
    write_text_atomic(path, page + "\n")
    return path


def _byline(run: RunFolder, profile: HeadProfile | None) -> str:
    parts = [f"run {run.name}"]
    if profile is not None:
        model, made = profile.model, profile.provenance
        parts += [
            f"{made.created}",
            f"{model.num_layers} layers of {model.num_kv_heads} KV heads",
            f"sink {profile.sink}, window {profile.window}",
        ]
        if made.seed is not None:
            parts.append(f"seed {made.seed}")
    if run.metrics:
        parts.append(f"{run.metrics[-1]['step']} steps")
        elapsed = charts.number(run.metrics[-1].get("elapsed"))
        if not math.isnan(elapsed):
            parts.append(f"{elapsed / 60:.1f} minutes of training")
    return ", ".join(parts)


def _accuracy(rows: list[EvaluationRow], tasks: list[tuple[str, int]]) -> Figure:
    series = {
        f"{task}, {n} problems": [row for row in rows if (row.task, row.n) == (task, n)]
        for task, n in tasks
    }
    return accuracy_figure(series, "Fresh problems")


def _interval_text(row: EvaluationRow) -> str:
    return "{:.3f}-{:.3f}".format(*accuracy_interval(row))


def _number(value: object, spec: str) -> str:
    found = charts.number(value)
    return "-" if math.isnan(found) else format(found, spec)


def _heads(heads: object) -> str:
    if not isinstance(heads, list) or not all(isinstance(h, list) and len(h) == 2 for h in heads):
        return "-"
    named = (f"layer {one_line(layer)} head {one_line(head)}" for layer, head in heads)
    return ", ".join(named) or "-"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)
