"""Heat map of a profile's gates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, write_bytes_atomic
from rlkv_vllm.profile.schema import HeadProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def plot_profile(profile: HeadProfile, sparsity: float, path: str | Path) -> None:
    """Draw the gates, layers x KV heads, and mark the full heads at `sparsity`.

    Raises:
        RlkvError: if the suffix is unknown, `sparsity` is no share, or the file cannot be
            written.
    """
    plot_format(path)  # before the work
    save_figure(profile_figure(profile, sparsity), path)


def profile_figure(profile: HeadProfile, sparsity: float) -> Figure:
    """As `plot_profile`, without the file."""
    allocation = allocate(profile.gates, sparsity)
    from matplotlib.figure import Figure  # a Figure of its own: no display, no global state

    layers, heads = allocation.num_layers, allocation.num_kv_heads
    # Cells of 0.27 inch, room for labels and title.
    figure = Figure(figsize=(max(6.0, 0.27 * layers + 1.6), 0.27 * heads + 1.4), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    by_head = list(zip(*profile.gates, strict=True))
    image = axes.imshow(by_head, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    full = [(layer, head) for layer, ids in enumerate(allocation.full) for head in ids]
    axes.scatter(
        [layer for layer, _ in full],
        [head for _, head in full],
        s=22,
        facecolor="white",
        edgecolor="black",
        linewidth=0.8,
        clip_on=False,
        label=f"full head ({allocation.num_full}); the other {allocation.num_streaming} are "
        "streaming heads",
    )
    axes.set_xticks(range(0, layers, 1 if layers <= 12 else 4))
    axes.set_yticks(range(heads))
    axes.set_xticks([edge - 0.5 for edge in range(1, layers)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, heads)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel="layer", ylabel="KV head")
    axes.set_title(
        f"{one_line(profile.model.id, 60)}: gates by {one_line(profile.provenance.method, 30)}, "
        f"sparsity {sparsity:g}",
        parse_math=False,
        fontsize="medium",
    )
    figure.colorbar(image, ax=axes, label="gate", pad=0.02)
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    return figure


def plot_format(path: str | Path) -> str:
    """The format that the suffix of `path` chooses.

    Raises:
        RlkvError: if it is none of `FORMATS`.
    """
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise RlkvError(f"{one_line(path)}: output must end in one of .{', .'.join(FORMATS)}")
    return suffix


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` in the format that the suffix of `path` chooses, atomically.

    Raises:
        RlkvError: if the suffix is unknown or the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=plot_format(path))
    write_bytes_atomic({Path(path): buffer.getvalue()})
