"""The figures of a run's report."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Steps that a figure shows at most, so that the page stays small.
MAX_STEPS_SHOWN = 250
#: The gates of up to so many heads are lines, those of more heads a heat map.
MAX_GATE_LINES = 32
#: Points of the heat map at most; noise does not compress.
MAX_HEAT_POINTS = 25_000

_T = TypeVar("_T")

# Curves by panel: the label of the axis, and name and key of each line.
TRAINING_CURVES = {
    "reward": {"mean": "reward", "standard deviation": "reward_std"},
    "penalty": {"penalty": "penalty"},
    "output tokens": {"mean": "output_tokens"},
    "share cut off": {"cut off": "clipped"},
}
GATE_CURVES = {
    "gates": {"mean": "gate_mean", "share below 0.1": "gate_low", "share above 0.9": "gate_high"}
}
_IN_0_TO_1 = ("reward", "share cut off", "gates")


def curves_figure(
    metrics: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]]
) -> Figure | None:
    """One panel for each of `panels` that has a value; None if none has."""
    rows = _thinned(metrics, MAX_STEPS_SHOWN)
    steps = [row["step"] for row in rows]
    shown: list[tuple[str, dict[str, list[float]]]] = []
    for label, lines in panels.items():
        columns = {name: [number(row.get(key)) for row in rows] for name, key in lines.items()}
        known = {name: it for name, it in columns.items() if not all(map(math.isnan, it))}
        if known:
            shown.append((label, known))

    def plot(axes: Axes, index: int) -> None:
        label, lines = shown[index]
        for name, values in lines.items():
            axes.plot(steps, values, label=name, linewidth=1.3, **_dots(steps))
        axes.set_ylabel(label)
        axes.set_ylim(*((-0.03, 1.03) if label in _IN_0_TO_1 else (0, None)))
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize="small")

    return _grid(len(shown), plot) if shown else None


def gates_figure(gates: Sequence[tuple[int, list[list[float]]]]) -> Figure:
    """Every gate over the steps: lines for a few heads, a heat map for many.

    All gates ``[layers][KV heads]`` have the same shape.
    """
    heads = [(layer, head) for layer, row in enumerate(gates[0][1]) for head in range(len(row))]
    is_heat_map = len(heads) > MAX_GATE_LINES
    most = max(2, MAX_HEAT_POINTS // len(heads)) if is_heat_map else MAX_STEPS_SHOWN
    shown = _thinned(gates, min(most, MAX_STEPS_SHOWN))
    steps = [step for step, _ in shown]
    curves = [[table[layer][head] for _, table in shown] for layer, head in heads]
    layers = len(gates[0][1])

    def lines(axes: Axes, _: int) -> None:
        from matplotlib import colormaps

        colours = colormaps["viridis"].resampled(layers + 1)  # the lightest is too light
        for (layer, head), values in zip(heads, curves, strict=True):
            label = None if head else f"layer {layer}"
            axes.plot(steps, values, color=colours(layer), linewidth=1, label=label, **_dots(steps))
        axes.set_ylabel("gate of every KV head")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(frameon=False, fontsize="small", ncols=2)

    def heat(axes: Axes, _: int) -> None:
        image = axes.imshow(
            curves,
            cmap="viridis",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="none",  # one pixel a gate, not one a dot
            extent=(steps[0] - 0.5, steps[-1] + 0.5, layers - 0.5, -0.5),
        )
        axes.set_ylabel(f"layer ({len(heads) // layers} KV heads each)")
        axes.figure.colorbar(image, ax=axes, label="gate", pad=0.02)
        axes.grid(False)

    if is_heat_map:
        return _grid(1, heat, height=min(8.0, 2.0 + 0.012 * len(heads)))
    return _grid(1, lines)


def data_uri(figure: Figure) -> str:
    """`figure` as SVG in a data URI: in an img element, its ids cannot clash with others."""
    import matplotlib

    buffer = io.StringIO()
    # Text as text keeps it small; salt and no date make the same run the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlkv"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is enough for coordinates, and halves the curves.
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), buffer.getvalue()
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def number(value: object) -> float:
    """`value` if it is a finite number, else NaN, which is a gap in a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _grid(panels: int, plot: Callable[[Axes, int], None], height: float = 3.0) -> Figure:
    """Axes over the steps, two in a row, each filled by `plot(axes, index)`."""
    from matplotlib.figure import Figure  # a Figure of its own: no display, no global state
    from matplotlib.ticker import MaxNLocator

    rows = -(-panels // 2)
    figure = Figure(figsize=(9.5, height * rows))
    figure.set_layout_engine("constrained")
    for index in range(panels):
        axes = figure.add_subplot(rows, min(panels, 2), index + 1)
        axes.set_xlabel("step")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        plot(axes, index)
    return figure


def _thinned(rows: Sequence[_T], most: int) -> Sequence[_T]:
    """Every k-th row and the last one, at most `most`."""
    if len(rows) <= most:
        return rows
    return [*rows[: -1 : -(-len(rows) // (most - 1))], rows[-1]]


def _dots(steps: Sequence[int]) -> dict[str, Any]:
    """A line through one point is invisible."""
    return {"marker": "o", "markersize": 3} if len(steps) < 3 else {}
