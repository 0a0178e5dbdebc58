"""Report of a benchmark: Markdown (`report.md.j2`) and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.decode import BASE_CONTEXT, Decode
from rlkv_vllm.bench.record import Result, median, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gains(case: Case, metric: Metric, result: Result) -> list[float]:
    """The split's gain over stock in each round, whose turns are neighbours in time."""
    first, second = (result["samples"].get(variant, []) for variant in case.variants)
    pairs = (metric.gain(a[metric.key], b[metric.key]) for a, b in zip(first, second, strict=False))
    return [gain for gain in pairs if gain is not None]


def gain_text(case: Case, result: Result) -> str:
    """A result in one line, for progress messages."""
    parts = []
    for metric in case.metrics:
        values = gains(case, metric, result)
        if metric.is_ratio_shown and values:
            expected = result["expected"].get(metric.key)
            beside = f" (roofline {expected:.2f})" if expected else ""
            parts.append(f"{metric.key} {statistics.median(values):.2f}x{beside}")
    return ", ".join(parts) or "nothing to compare"


def markdown(content: Mapping[str, Any], picture: str | None = None) -> str:
    """The report.

    Args:
        content: of a `Record`.
        picture: file name of the plot beside it.
    """
    results: list[Result] = content["results"]
    dates = sorted(result["date"][:10] for result in results)
    cases = []
    for name, kind in CASES.items():
        found = [result for result in results if result["case"] == name]
        if found or content["too_large"].get(name):
            attention = _attention(found) if kind is Decode else []
            cases.append((kind, *_table(kind(), found), attention))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["mib"] = lambda size: f"{size / 2**20:,.0f} MiB"
    return environment.get_template("report.md.j2").render(
        content,
        base_context=BASE_CONTEXT,
        cases=cases,
        days=" to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        medians=lambda result, key: [median(result, variant, key) for variant in (STOCK, SPLIT)],
        picture=picture,
    )


def _table(case: Case, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a case's results."""
    stock, split = case.variants
    header = [*case.columns.values()]
    for metric in case.metrics:
        header += [f"{stock}: {metric.label}", split]
        header += ["ratio", "roofline", "reached"] if metric.is_ratio_shown else []
    rows = []
    for result in results:
        rows.append([_value(result["point"][key]) for key in case.columns])
        for metric in case.metrics:
            rows[-1] += _metric_cells(case, metric, result)
    return header, rows


def _metric_cells(case: Case, metric: Metric, result: Result) -> list[str]:
    cells = []
    for variant in case.variants:
        if not result["samples"].get(variant):
            cells.append("-")
            continue
        figures = (median(result, variant, metric.key), *spread(result, variant, metric.key))
        middle, low, high = (_number(value * metric.scale) for value in figures)
        cells.append(f"{middle} ({low}-{high})")
    if metric.is_ratio_shown:
        values = gains(case, metric, result)
        expected = result["expected"].get(metric.key)
        if not values:
            return [*cells, "-", "-", "-"]
        gain = statistics.median(values)
        cells.append(f"**{gain:.2f}** ({min(values):.2f}-{max(values):.2f})")
        cells += [f"{expected:.2f}", f"{gain / expected:.0%}"] if expected else ["-", "-"]
    return cells


def _attention(results: Sequence[Result]) -> list[list[str]]:
    """What the context adds to a decode step: attention alone, without weights and all else."""
    measured = [r for r in results if all(r["samples"].get(v) for v in Decode.variants)]
    bases = {r["point"]["batch"]: r for r in measured if r["point"]["context"] == BASE_CONTEXT}
    rows = []
    for result in measured:
        batch, context = result["point"]["batch"], result["point"]["context"]
        if context == BASE_CONTEXT or batch not in bases:
            continue
        stock, split = (
            median(result, variant, "seconds") - median(bases[batch], variant, "seconds")
            for variant in Decode.variants
        )
        if min(stock, split) > 0:
            gain, expected = stock / split, result["expected"]["attention"]
            added = [f"{1e3 * seconds:.1f}" for seconds in (stock, split)]
            ratios = [f"**{gain:.2f}**", f"{expected:.2f}", f"{gain / expected:.0%}"]
            rows.append([str(batch), f"{context:,}", *added, *ratios])
    return rows


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def figure(content: Mapping[str, Any]) -> Figure | None:
    """Gains beside the roofline on the left, decode steps on the right; None without results."""
    from matplotlib.figure import Figure

    rows = []
    for result in content["results"]:
        case = CASES[result["case"]]()
        for metric in case.metrics:
            values = gains(case, metric, result) if metric.is_ratio_shown else []
            if values:
                rows.append((case, metric, result, values))
    if not rows:
        return None
    decode = [r for r in content["results"] if r["case"] == Decode.name]
    wide = len(decode) > 1
    plot = Figure(figsize=(11 if wide else 7, max(3.2, 0.24 * len(rows) + 1.4)), dpi=150)
    plot.set_layout_engine("constrained")
    axes = plot.subplots(1, 2 if wide else 1, squeeze=False)[0]
    left = axes[0]
    for place, (case, metric, result, values) in enumerate(rows):
        gain = statistics.median(values)
        errors = [[max(0.0, gain - min(values))], [max(0.0, max(values) - gain)]]
        color = f"C{list(CASES).index(case.name) % 10}"
        left.errorbar(gain, place, xerr=errors, fmt="o", color=color, capsize=2, markersize=4)
        expected = result["expected"].get(metric.key)
        if expected:
            left.plot(expected, place, "D", mfc="none", color="0.4", markersize=5)
    left.axvline(1, color="0.6", linewidth=1)
    left.set_yticks(range(len(rows)), [_row_label(*row[:3]) for row in rows], fontsize="x-small")
    left.invert_yaxis()
    left.set_xlabel("gain over stock vLLM (diamond: roofline)")
    left.grid(axis="x", color="0.9", linewidth=0.8)
    if wide:
        _plot_decode(axes[1], decode)
    for one in axes:
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return plot


def _row_label(case: Case, metric: Metric, result: Result) -> str:
    point = " ".join(_value(result["point"][key]) for key in case.columns)
    label = metric.label.split(" (")[0]
    return f"{case.name} {point} {label}".replace("$", r"\$")


def _plot_decode(axes: Any, results: Sequence[Result]) -> None:
    batches = sorted({result["point"]["batch"] for result in results})
    for index, batch in enumerate(batches):
        of_batch = sorted(
            (r for r in results if r["point"]["batch"] == batch),
            key=lambda r: r["point"]["context"],
        )
        for variant, line in ((STOCK, "--"), (SPLIT, "-")):
            known = [r for r in of_batch if r["samples"].get(variant)]
            axes.plot(
                [r["point"]["context"] for r in known],
                [median(r, variant, "seconds") * 1e3 for r in known],
                line,
                marker="o",
                markersize=3,
                color=f"C{index % 10}",
                label=f"{variant}, batch {batch}",
            )
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decode step (ms)")
    axes.grid(color="0.9", linewidth=0.8)
    axes.legend(frameon=False, fontsize="x-small")
