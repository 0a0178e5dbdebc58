"""Markdown and a picture of a benchmark's results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkv_vllm.bench.case import SPLIT, STOCK, Case, Metric
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.decode import BASE_CONTEXT, Decode
from rlkv_vllm.bench.record import Result, median, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gains(case: Case, metric: Metric, result: Result) -> list[float]:
    """The split's gain over stock, round by round: neighbours in time are compared."""
    first, second = (result["samples"].get(variant, []) for variant in case.variants)
    pairs = (metric.gain(a[metric.key], b[metric.key]) for a, b in zip(first, second, strict=False))
    return [gain for gain in pairs if gain is not None]


def gain_text(case: Case, result: Result) -> str:
    """One line on a result."""
    parts = []
    for metric in case.metrics:
        values = gains(case, metric, result)
        if metric.is_ratio_shown and values:
            expected = result["expected"].get(metric.key)
            beside = f" (roofline {expected:.2f})" if expected else ""
            parts.append(f"{metric.key} {statistics.median(values):.2f}x{beside}")
    return ", ".join(parts) or "nothing to compare"


def markdown(content: Mapping[str, Any], picture: str | None = None) -> str:
    """The whole report.

    Args:
        content: of a `Record`.
        picture: file name of the plot beside it.
    """
    results: list[Result] = content["results"]
    dates = sorted(result["date"] for result in results)
    lines = ["# rlkv bench: the split KV cache beside stock vLLM", ""]
    if dates:
        days = " to ".join(sorted({dates[0][:10], dates[-1][:10]}))
        lines += [f"{days}:", "", "```bash", *content["settings"]["commands"], "```", ""]
    lines += _conditions(content)
    lines += _answer(results)
    if picture:
        lines += [f"![Gains over stock vLLM, and decode steps]({picture})", ""]
    for name, kind in CASES.items():
        found = [r for r in results if r["case"] == name]
        skipped = content["settings"].get("too_large", {}).get(name, [])
        if found or skipped:
            lines += _case(kind(), found, skipped)
    lines += [
        "Ratios are medians over the rounds of split and stock measured one after the other, with "
        "the least and the greatest; above 1 the split is better. *Roofline* is what the bytes to "
        "read and the operations to do allow on a machine with the bandwidth and speed above, "
        "nothing else counted. *Reached* is the ratio over it.",
        "",
    ]
    return "\n".join(lines)


def _conditions(content: Mapping[str, Any]) -> list[str]:
    machine, settings = content["machine"], content["settings"]
    lines = [
        f"- Machine: {machine['cpu']}, {machine['cores']} core(s) used, {machine['platform']}, "
        f"Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    ]
    for name, device in content["devices"].items():
        lines.append(
            f"- Measured for {name}: copies {device['bytes_per_s'] / 1e9:.1f} GB/s, matrix "
            f"products {device['flops_per_s'] / 1e9:,.0f} GFLOP/s ({device['name']})"
        )
    for target in settings["targets"].values():
        lines.append(
            f"- {target['model']}: {target['layers']} layers x {target['kv_heads']} KV heads x "
            f"{target['head_dim']}, {target['weights_bytes'] / 2**20:,.0f} MiB of weights, "
            f"{target['engine']['dtype']}, "
            f"{'eager' if target['engine']['enforce_eager'] else 'compiled'}, "
            f"{target['threads']} thread(s); profile {target['profile']}, sparsity "
            f"{target['sparsity']:g} ({target['full_heads']} full, {target['streaming_heads']} "
            f"streaming heads, sink {target['sink']}, window {target['window']}); KV cache "
            f"{target['memory_bytes'] / 2**20:,.0f} MiB for each engine"
        )
    loads = [result["load"] for result in content["results"]]
    if loads:
        lines.append(
            f"- Load of the machine while measuring: {min(loads):.1f} to {max(loads):.1f}"
            + (
                ""
                if all(result["alternating"] for result in content["results"])
                else "; some engines did not fit beside each other and did not take turns"
            )
        )
    return [*lines, ""]


def _answer(results: Sequence[Result]) -> list[str]:
    """The question that a user has before deploying."""
    lines = []
    for result in results:
        if result["case"] == "capacity" and STOCK in result["samples"]:
            case = CASES["capacity"]()
            running = {v: median(result, v, "running") for v in case.variants}
            rates = {v: median(result, v, "tokens_per_s") for v in case.variants}
            lines.append(
                f"- **How many more users**: {running[SPLIT]:.1f} requests of up to "
                f"{result['point']['tokens']:,} tokens at once instead of {running[STOCK]:.1f}, at "
                f"equal memory: {running[SPLIT] / running[STOCK]:.2f} times as many."
            )
            lines.append(
                f"- **How much faster**: {rates[SPLIT]:,.1f} tok/s instead of {rates[STOCK]:,.1f} "
                f"with a full cache: {rates[SPLIT] / rates[STOCK]:.2f} times."
            )
        if result["case"] == "solve" and STOCK in result["samples"]:
            solved = {v: median(result, v, "solved") for v in (STOCK, SPLIT)}
            seconds = {v: median(result, v, "seconds_per_solved") for v in (STOCK, SPLIT)}
            lines.append(
                f"- **At what quality** ({result['target']}, {result['point']['n']} problems of "
                f"{result['point']['task']}): {solved[SPLIT]:.1%} solved instead of "
                f"{solved[STOCK]:.1%}, {seconds[SPLIT]:.3g} s per solved problem instead of "
                f"{seconds[STOCK]:.3g} s."
            )
    return [*lines, ""] if lines else []


def _case(case: Case, results: Sequence[Result], too_large: Sequence[str]) -> list[str]:
    lines = [f"## {case.title}", ""]
    if case.note:
        lines += [case.note, ""]
    if results:
        stock, split = case.variants
        header = [*case.columns.values()]
        for metric in case.metrics:
            header += [f"{stock}: {metric.label}", f"{split}"]
            if metric.is_ratio_shown:
                header += ["ratio", "roofline", "reached"]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for result in results:
            cells = [_value(result["point"][key]) for key in case.columns]
            for metric in case.metrics:
                cells += _metric_cells(case, metric, result)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if isinstance(case, Decode):
        lines += _attention(case, results)
    if too_large:
        lines += [f"Not run, would need more: {'; '.join(too_large)}.", ""]
    return lines


def _metric_cells(case: Case, metric: Metric, result: Result) -> list[str]:
    cells = []
    for variant in case.variants:
        if not result["samples"].get(variant):
            cells.append("-")
            continue
        low, high = spread(result, variant, metric.key)
        middle = median(result, variant, metric.key)
        cells.append(
            f"{_number(middle * metric.scale)} "
            f"({_number(low * metric.scale)}-{_number(high * metric.scale)})"
        )
    if metric.is_ratio_shown:
        values = gains(case, metric, result)
        expected = result["expected"].get(metric.key)
        if not values:
            return [*cells, "-", "-", "-"]
        gain = statistics.median(values)
        cells.append(f"**{gain:.2f}** ({min(values):.2f}-{max(values):.2f})")
        cells += [f"{expected:.2f}", f"{gain / expected:.0%}"] if expected else ["-", "-"]
    return cells


def _attention(case: Decode, results: Sequence[Result]) -> list[str]:
    """What the context adds to a step: attention alone, weights and everything else taken off."""
    rows = []
    for base in results:
        if base["point"]["context"] != BASE_CONTEXT:
            continue
        for result in results:
            point = result["point"]
            if point["batch"] != base["point"]["batch"] or point["context"] == BASE_CONTEXT:
                continue
            added = {
                variant: median(result, variant, "seconds") - median(base, variant, "seconds")
                for variant in case.variants
                if result["samples"].get(variant) and base["samples"].get(variant)
            }
            if len(added) == 2 and min(added.values()) > 0:
                expected = result["expected"]["attention"]
                gain = added[STOCK] / added[SPLIT]
                rows.append(
                    f"| {point['batch']} | {point['context']:,} | {added[STOCK] * 1e3:.1f} | "
                    f"{added[SPLIT] * 1e3:.1f} | **{gain:.2f}** | {expected:.2f} | "
                    f"{gain / expected:.0%} |"
                )
    if not rows:
        return []
    return [
        f"What a context adds to the step at {BASE_CONTEXT} tokens, which is attention alone, "
        "beside the ratio of the bytes that it reads more:",
        "",
        "| batch | context | stock: added (ms) | split | ratio | bytes | reached |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


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
    drawing = Figure(figsize=(11 if wide else 7, max(3.2, 0.24 * len(rows) + 1.4)), dpi=150)
    drawing.set_layout_engine("constrained")
    axes = drawing.subplots(1, 2 if wide else 1, squeeze=False)[0]
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
        _draw_decode(axes[1], decode)
    for one in axes:
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return drawing


def _row_label(case: Case, metric: Metric, result: Result) -> str:
    point = " ".join(_value(result["point"][key]) for key in case.columns)
    label = metric.label.split(" (")[0]
    return f"{case.name} {point} {label}".replace("$", r"\$")


def _draw_decode(axes: Any, results: Sequence[Result]) -> None:
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
