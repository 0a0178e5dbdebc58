"""Accuracy and output length against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """One measurement as the plot shows it; `interval` is that of the accuracy."""

    sparsity: float
    accuracy: float
    interval: tuple[float, float]
    mean_output_tokens: float
    p95_output_tokens: int | None = None


def accuracy_figure(series: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Plot one line per profile, accuracy on the left and output length on the right.

    Args:
        series: points by label, at least one. A point at sparsity 0 (full cache) becomes the line
            that the others are compared with.
        title: above both plots.
    """
    from matplotlib.figure import Figure  # a Figure of its own: no display, no global state

    figure = Figure(figsize=(9.5, 4.0), dpi=150)
    figure.set_layout_engine("constrained")
    accuracy, length = figure.subplots(1, 2)
    handles: dict[str, Any] = {}
    full = next((p for points in series.values() for p in points if p.sparsity == 0), None)
    if full is not None:
        style = {"color": "0.45", "linestyle": "--", "linewidth": 1, "zorder": 1}
        handles["full cache"] = accuracy.axhline(full.accuracy, **style)
        length.axhline(full.mean_output_tokens, **style)
    # Intervals of several profiles at one sparsity would hide each other.
    step = 0.006 if len(series) > 1 else 0.0
    for index, (label, given) in enumerate(series.items()):
        points = sorted(given, key=lambda point: point.sparsity)
        shift = step * (index - (len(series) - 1) / 2)
        x = [point.sparsity + shift for point in points]
        style = {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}
        style |= {"markersize": 5, "linewidth": 1.5}
        below = [max(0.0, point.accuracy - point.interval[0]) for point in points]
        above = [max(0.0, point.interval[1] - point.accuracy) for point in points]
        handles[label.replace("$", r"\$")] = accuracy.errorbar(
            x,
            [point.accuracy for point in points],
            yerr=[below, above],
            capsize=2.5,
            elinewidth=1,
            **style,
        )
        length.plot(x, [point.mean_output_tokens for point in points], **style)
        known = [(at, p.p95_output_tokens) for at, p in zip(x, points, strict=True)]
        known = [(at, tokens) for at, tokens in known if tokens is not None]
        length.plot(
            [at for at, _ in known],
            [tokens for _, tokens in known],
            **(style | {"linestyle": ":", "marker": "_", "linewidth": 1}),
        )
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.set_ylabel("accuracy, with 95% interval")
    length.set_ylim(bottom=0)
    length.set_ylabel("output tokens (dotted: 95th percentile)")
    for axes in (accuracy, length):
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel("sparsity (share of streaming heads)")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False, fontsize="medium")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, len(series) + 1),
        frameon=False,
        fontsize="small",
    )
    return figure
