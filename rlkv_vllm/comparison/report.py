"""Report of a comparison: Markdown (`report.md.j2`) and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from rlkv_vllm.answers import Sampling
from rlkv_vllm.comparison.plot import figure
from rlkv_vllm.comparison.record import Record
from rlkv_vllm.comparison.tables import (
    LEVEL,
    Comparison,
    Figures,
    ModelTables,
    Panel,
    tables,
)
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.profile.plot import save_figure

REPORT_FILE, PLOT_FILE = "report.md", "report.png"

Table = tuple[list[str], list[list[str]]]


def write_report(record: Record, folder: Path) -> list[Path]:
    """Write report and plot of what is measured so far; returns the files, none without results."""
    found = tables(record.content)
    if not found:
        return []
    save_figure(figure(found), folder / PLOT_FILE)
    write_text_atomic(folder / REPORT_FILE, markdown(record, found))
    return [folder / REPORT_FILE, folder / PLOT_FILE]


def markdown(record: Record, found: Sequence[ModelTables]) -> str:
    """The report of a record, with its tables."""
    content = record.content
    dates = sorted(
        answers["date"][:10]
        for label in content["asked"]["models"]
        for answers in content["models"][label]["answers"].values()
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    sampling = {
        label: Sampling.model_validate(entry["settings"]["sampling"]).describe()
        for label, entry in content["models"].items()
    }
    return environment.get_template("report.md.j2").render(
        content,
        settings=record.settings,
        tables=found,
        days=" to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        sampling=sampling,
        versions=", ".join(f"{k} {v}" for k, v in content["machine"]["versions"].items()),
        findings=[*findings(found, content["asked"]["reference"])],
        accuracy=_accuracy,
        compared=_compared,
        costs=_costs,
        level=LEVEL,
        picture=PLOT_FILE,
    )


def findings(found: Sequence[ModelTables], reference: str) -> Iterable[str]:
    """What the numbers say about the reference, in a sentence per model and sparsity."""
    words = {
        "win": f"`{reference}` solves more than",
        "tie": "no difference is shown to",
        "loss": f"`{reference}` solves fewer than",
    }
    for model in found:
        for panel in model.panels:
            parts = []
            for outcome, text in words.items():
                these = [one for one in panel.comparisons if one.outcome == outcome]
                if these:
                    parts.append(f"{text} {', '.join(map(_in_words, these))}")
            if parts:
                yield f"{model.label} at sparsity {panel.sparsity:g}: {'; '.join(parts)}."


def _in_words(one: Comparison) -> str:
    is_loss = one.outcome == "loss"
    bound = f"at most {_points(one.high)}" if is_loss else f"at least {_points(one.low)}"
    return f"`{one.method}` ({_points(one.difference)} points, {bound}; p {_p(one.p)})"


def _accuracy(panel: Panel) -> Table:
    header = ["method", "accuracy", "95% interval", "mean tokens", "at cap", "same heads"]
    return header, [
        [
            f"`{row.method}`",
            _by_seed(row),
            f"{row.interval[0]:.3f}-{row.interval[1]:.3f}",
            f"{row.mean_output_tokens:.1f}",
            f"{row.capped_share:.1%}",
            "-" if row.agreement is None else f"{row.agreement:.2f}",
        ]
        for row in panel.rows
    ]


def _by_seed(row: Figures) -> str:
    each = " ".join(f"{share:.3f}" for share in row.by_seed)
    return f"{row.accuracy:.3f}" + (f" ({each})" if len(row.by_seed) > 1 else "")


def _compared(panel: Panel) -> Table:
    header = ["against", "difference", "at least", "at most", "p", "pairs", "outcome"]
    return header, [
        [
            f"`{one.method}`",
            _points(one.difference),
            _points(one.low),
            _points(one.high),
            _p(one.p),
            f"{one.seeds}",
            one.outcome,
        ]
        for one in panel.comparisons
    ]


def _costs(model: ModelTables) -> Table:
    return ["method", "CPU seconds of a profile", "wall seconds"], [
        [f"`{row.method}`", _spread(row.cpu_seconds), _spread(row.seconds)] for row in model.costs
    ]


def _spread(value: tuple[float, float, float] | None) -> str:
    if value is None:
        return "-"
    mean, least, most = (f"{seconds:,.0f}" for seconds in value)
    return mean if least == most else f"{mean} ({least}-{most})"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _p(p: float) -> str:
    return f"{p:.2g}"


def summary(found: Sequence[ModelTables]) -> list[tuple[str, ...]]:
    """Rows for a terminal, of every model, sparsity and method."""
    rows: list[tuple[str, ...]] = []
    for model in found:
        costs = {row.method: _spread(row.cpu_seconds) for row in model.costs}
        for panel in model.panels:
            against: dict[str, Any] = {one.method: one for one in panel.comparisons}
            for row in panel.rows:
                one = against.get(row.method)
                rows.append(
                    (
                        model.label,
                        f"{panel.sparsity:g}",
                        row.method,
                        _by_seed(row),
                        f"{row.mean_output_tokens:.0f}",
                        f"{row.capped_share:.1%}",
                        costs.get(row.method, "-"),
                        f"{_points(one.difference)} (p {_p(one.p)})" if one else "-",
                    )
                )
    return rows
