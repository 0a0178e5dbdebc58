"""benchmarks/allocation_ceiling.py on the embedded model, with answers cut off early."""

import json
from pathlib import Path

import pytest

from rlkv_vllm.errors import RlkvError
from tests.support.scripts import load_benchmark

pytest.importorskip("trl")


def test_the_best_allocation_and_a_profile_solve_fresh_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ceiling = load_benchmark("allocation_ceiling")
    monkeypatch.syspath_prepend(Path(ceiling.__file__).parent)
    shipped = Path(ceiling.__file__).parents[1] / "head_profiles" / "embedded.json"
    output = tmp_path / "ceiling.json"
    call = ["embedded", f"shipped={shipped}", "--sparsity", ".2", "--output", str(output)]
    call += ["--candidates", "4", "--problems", "4", "--n", "3", "--max-new-tokens", "100"]
    ceiling.main(ceiling.parse_args(call))
    result = json.loads(output.read_text())
    assert len(result["streaming"]) == 4
    assert {0, 1 / 3, 2 / 3, 1} >= {result["solved"], result["known"]["shipped"]["solved"]}
    assert result["known"]["shipped"]["streaming"] in [one for one, _ in result["finalists"]]
    capsys.readouterr()
    ceiling.main(ceiling.parse_args(call))
    assert "answers" not in capsys.readouterr().err, "all are in the cache"
    assert json.loads(output.read_text())["streaming"] == result["streaming"]
    other = ["--cache", str(output.with_suffix(".cache.json")), "--max-new-tokens", "99"]
    with pytest.raises(RlkvError, match="other settings"):
        ceiling.main(ceiling.parse_args([*call, *other]))
    with pytest.raises(RlkvError, match="nothing to choose"):
        ceiling.main(ceiling.parse_args([*call, "--sparsity", "1"]))
