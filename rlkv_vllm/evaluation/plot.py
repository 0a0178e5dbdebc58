"""Accuracy and output length against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkv_vllm.evaluation.rows import accuracy_interval
from rlkv_vllm.profile.schema import EvaluationRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


def accuracy_figure(series: Mapping[str, Sequence[EvaluationRow]], title: str) -> Figure:
    """Plot one line per profile, accuracy on the left and output length on the right.

    Args:
        series: rows by label, at least one. A row at sparsity 0 (full cache) becomes the line
            that the others are compared with.
        title: above both plots.
    """
    from matplotlib.figure import Figure  # a Figure of its own: no display, no global state

    figure = Figure(figsize=(9.5, 4.0), dpi=150)
    figure.set_layout_engine("constrained")
    accuracy, length = figure.subplots(1, 2)
    handles: dict[str, Any] = {}
    full = next((row for rows in series.values() for row in rows if row.sparsity == 0), None)
    if full is not None:
        style = {"color": "0.45", "linestyle": "--", "linewidth": 1, "zorder": 1}
        handles["full cache"] = accuracy.axhline(full.accuracy, **style)
        length.axhline(full.mean_output_tokens, **style)
    # Intervals of several profiles at one sparsity would hide each other.
    step = 0.006 if len(series) > 1 else 0.0
    for index, (label, given) in enumerate(series.items()):
        rows = sorted(given, key=lambda row: row.sparsity)
        shift = step * (index - (len(series) - 1) / 2)
        x = [row.sparsity + shift for row in rows]
        y = [row.accuracy for row in rows]
        below = [max(0.0, row.accuracy - accuracy_interval(row)[0]) for row in rows]
        above = [max(0.0, accuracy_interval(row)[1] - row.accuracy) for row in rows]
        style = {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}
        style |= {"markersize": 5, "linewidth": 1.5}
        handles[label.replace("$", r"\$")] = accuracy.errorbar(
            x, y, yerr=[below, above], capsize=2.5, elinewidth=1, **style
        )
        length.plot(x, [row.mean_output_tokens for row in rows], **style)
        known = [(at, row.p95_output_tokens) for at, row in zip(x, rows, strict=True)]
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
