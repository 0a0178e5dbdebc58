"""Accuracy of all methods, one panel per model and sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkv_vllm.comparison.tables import ModelTables
from rlkv_vllm.evaluation.splits import FULL

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(models: Sequence[ModelTables]) -> Figure:
    """Accuracy with its 95% interval, a point per seed, and a line for the full cache."""
    from matplotlib.figure import Figure  # a Figure of its own: no display, no global state

    rows, columns = len(models), max(len(model.panels) for model in models)
    names = list(dict.fromkeys(row.method for m in models for p in m.panels for row in p.rows))
    methods = [name for name in names if name != FULL]
    height = 0.28 * len(methods) + 0.9
    plot = Figure(figsize=(1.6 + 3.6 * columns, rows * height), dpi=150)
    plot.set_layout_engine("constrained")
    for line, model in zip(plot.subplots(rows, columns, squeeze=False), models, strict=True):
        for axes, panel in zip(line, model.panels, strict=False):
            for row in panel.rows:
                if row.method == FULL:
                    axes.axvline(row.accuracy, color="0.45", linestyle="--", linewidth=1)
                    continue
                place = methods.index(row.method)
                error = [[max(0.0, row.accuracy - row.interval[0])]]
                error.append([max(0.0, row.interval[1] - row.accuracy)])
                axes.errorbar(
                    row.accuracy, place, xerr=error, fmt="o", color="C0", capsize=2, markersize=4
                )
                if len(row.by_seed) > 1:
                    places = [place] * len(row.by_seed)
                    axes.plot(row.by_seed, places, "|", color="0.2", markersize=7)
            axes.set_yticks(range(len(methods)), methods, fontsize="x-small")
            axes.set_ylim(len(methods) - 0.5, -0.5)
            axes.set_title(
                f"{model.label}, sparsity {panel.sparsity:g}", fontsize="small", parse_math=False
            )
            axes.set_xlabel("accuracy (dashed: full cache)", fontsize="x-small")
            axes.tick_params(axis="x", labelsize="x-small")
            axes.grid(axis="x", color="0.9", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    return plot
