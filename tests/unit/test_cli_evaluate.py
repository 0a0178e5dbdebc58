"""``rlkv eval`` refuses bad input before any engine starts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rlkv_vllm.cli import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.served import Score


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "0,half"], "--sparsity 0,half"),
        (["--sparsity", "1.5"], "1.5"),
        (["--memory", "much"], "--memory much"),
        (["--task", "sudoku"], "sudoku"),
        (["--profile", "nowhere.json"], "nowhere.json"),
        (["no/such/folder/at/all"], "no/such/folder/at/all"),
    ],
)
def test_bad_input(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert isinstance(result.exception, RlkvError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_interval_contains_the_accuracy_and_stays_in_range() -> None:
    for solved in (0, 1, 95, 100):
        score = Score("t", 0.2, 100, solved, 10.0, 20, 0)
        low, high = score.interval
        assert 0 <= low <= score.accuracy + 1e-9
        assert score.accuracy - 1e-9 <= high <= 1
        assert high - low < 0.12
    assert Score("t", 0.2, 100, 50, 10.0, 20, 0).interval == pytest.approx(
        (0.4038, 0.5962), abs=1e-3
    )
