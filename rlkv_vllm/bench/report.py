"""Report of a benchmark: Markdown (`report.md.j2`) and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.decode import BASE_CONTEXT, Decode
from rlkv_vllm.bench.record import Result, median

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gains(case: Case, metric: Metric, result: Result) -> list[float]:
    """The second variant's gain in each round, whose turns are neighbours in time."""
    first, second = (result["samples"].get(variant, []) for variant in case.variants)
    pairs = (metric.gain(a[metric.key], b[metric.key]) for a, b in zip(first, second, strict=False))
    return [gain for gain in pairs if gain is not None]


def _compared(case: Case, result: Result) -> Iterator[tuple[Metric, list[float], float | None]]:
    """Metrics whose ratio is shown, with their gains and the roofline's."""
    for metric in case.metrics:
        values = gains(case, metric, result) if metric.is_ratio_shown else []
        if values:
            yield metric, values, result["expected"].get(metric.key)


def gain_text(case: Case, result: Result) -> str:
    """A result in one line, for progress messages."""
    parts = []
    for metric, values, expected in _compared(case, result):
        beside = f" (roofline {expected:.2f})" if expected else ""
        parts.append(f"{metric.key} {statistics.median(values):.2f}x{beside}")
    return ", ".join(parts) or "nothing to compare"


def summary(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Case, point, figure, both variants' medians, ratio and roofline of every result."""
    rows = []
    for result in content["results"]:
        case = CASES[result["case"]]()
        point = ", ".join(f"{label} {result['point'][key]}" for key, label in case.columns.items())
        for metric in case.metrics:
            sides = [
                f"{variant} {_number(median(result, variant, metric.key) * metric.scale)}"
                for variant in case.variants
                if result["samples"].get(variant)
            ]
            values = gains(case, metric, result) if metric.is_ratio_shown else []
            expected = result["expected"].get(metric.key) if values else None
            ratio = f"{statistics.median(values):.2f}" if values else "-"
            bound = f"{expected:.2f}" if expected else "-"
            if len(sides) == len(case.variants):
                rows.append((case.name, point, metric.label, *sides, ratio, bound))
    return rows


def markdown(content: Mapping[str, Any], picture: str | None = None) -> str:
    """The report of a `Record`'s content; `picture` is the file name of the plot beside it."""
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
    first, second = case.variants
    header = [*case.columns.values()]
    for metric in case.metrics:
        header += [f"{first}: {metric.label}", second]
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
        turns = [sample[metric.key] * metric.scale for sample in result["samples"][variant]]
        middle, low, high = map(_number, (statistics.median(turns), min(turns), max(turns)))
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
            added = f"{1e3 * stock:.1f}", f"{1e3 * split:.1f}"
            ratios = f"**{gain:.2f}**", f"{expected:.2f}", f"{gain / expected:.0%}"
            rows.append([str(batch), f"{context:,}", *added, *ratios])
    return rows


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def figure(content: Mapping[str, Any]) -> Figure | None:
    """Gains beside the roofline on the left, decode steps on the right; None without results."""
    from matplotlib.figure import Figure

    cases = {name: kind() for name, kind in CASES.items()}
    results = [(cases[result["case"]], result) for result in content["results"]]
    rows = [(*each, *compared) for each in results for compared in _compared(*each)]
    if not rows:
        return None
    decode = [r for r in content["results"] if r["case"] == Decode.name]
    wide = len(decode) > 1
    plot = Figure(figsize=(11 if wide else 7, max(3.2, 0.24 * len(rows) + 1.4)), dpi=150)
    plot.set_layout_engine("constrained")
    axes = plot.subplots(1, 2 if wide else 1, squeeze=False)[0]
    left = axes[0]
    for place, (case, _, _, values, expected) in enumerate(rows):
        gain = statistics.median(values)
        errors = [[max(0.0, gain - min(values))], [max(0.0, max(values) - gain)]]
        color = f"C{list(CASES).index(case.name) % 10}"
        left.errorbar(gain, place, xerr=errors, fmt="o", color=color, capsize=2, markersize=4)
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


def _row_label(case: Case, result: Result, metric: Metric) -> str:
    point = " ".join(_value(result["point"][key]) for key in case.columns)
    label = metric.label.split(" (")[0]
    over = "" if case.variants[0] == STOCK else f" over {case.variants[0]}"
    return f"{case.name} {point} {label}{over}".replace("$", r"\$")


def _plot_decode(axes: Any, results: Sequence[Result]) -> None:
    for index, batch in enumerate(sorted({result["point"]["batch"] for result in results})):
        of_batch = [result for result in results if result["point"]["batch"] == batch]
        for variant, line in ((STOCK, "--"), (SPLIT, "-")):
            steps = {
                r["point"]["context"]: median(r, variant, "seconds") * 1e3
                for r in sorted(of_batch, key=lambda r: r["point"]["context"])
                if r["samples"].get(variant)
            }
            style = {"marker": "o", "markersize": 3, "color": f"C{index % 10}"}
            label = f"{variant}, batch {batch}"
            axes.plot(list(steps), list(steps.values()), line, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decode step (ms)")
    axes.grid(color="0.9", linewidth=0.8)
    axes.legend(frameon=False, fontsize="x-small")
