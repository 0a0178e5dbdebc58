"""The accuracy plot draws what it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkv_vllm.evaluation.plot import accuracy_figure
from rlkv_vllm.profile.plot import save_figure
from rlkv_vllm.profile.schema import EvaluationRow


def row(sparsity: float, accuracy: float, tokens: float, p95: int | None = None) -> EvaluationRow:
    return EvaluationRow(
        task="sums",
        n=100,
        sparsity=sparsity,
        accuracy=accuracy,
        full_accuracy=0.9,
        mean_output_tokens=tokens,
        p95_output_tokens=p95,
    )


def points(*pairs: tuple[float, float]) -> list[EvaluationRow]:
    return [row(sparsity, accuracy, 100 * (1 + sparsity)) for sparsity, accuracy in pairs]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_any_label_and_number_of_profiles(tmp_path: Path, suffix: str) -> None:
    series = {
        name: points((0, 0.9), (0.5, 0.8 - 0.01 * i), (1, 0.1))
        for i, name in enumerate(["_hidden", "cost $x$", r"\frac{", "long " * 8, "e", "f", "g"])
    }
    save_figure(accuracy_figure(series, "50% of $n_1"), tmp_path / f"plot.{suffix}")
    content = (tmp_path / f"plot.{suffix}").read_bytes()
    assert content[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_lines_go_through_the_points_in_order() -> None:
    shuffled = [row(1, 0.1, 300, 900), *points((0, 0.9)), *points((0.5, 0.8))]
    figure = accuracy_figure({"one": shuffled}, "t")
    accuracy, length = figure.axes
    line = next(line for line in accuracy.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == [0, 0.5, 1]
    assert list(line.get_ydata()) == [0.9, 0.8, 0.1]
    line = next(line for line in length.lines if line.get_marker() == "o")
    assert list(line.get_ydata()) == [100, 150, 300]
    line = next(line for line in length.lines if line.get_marker() == "_")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [900])


def test_no_full_cache_no_line_for_it() -> None:
    with_full = accuracy_figure({"one": points((0, 0.9), (0.5, 0.5))}, "t")
    without = accuracy_figure({"one": points((0.5, 0.5))}, "t")
    labels = [
        [text.get_text() for text in figure.legends[0].get_texts()]
        for figure in (with_full, without)
    ]
    assert labels == [["full cache", "one"], ["one"]]
