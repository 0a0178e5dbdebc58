"""`rlkv compare` on the embedded model, with a few answers each."""

import json
from pathlib import Path

from typer.testing import CliRunner

from rlkv_vllm import cli
from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.answers import Sampling
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.tasks import get_task

OPTIONS = [
    "--seeds", "0", "--sparsities", ".4", "--task", "hops", "--n", "5", "--score-n", "4",
    "--max-new-tokens", "150", "--threads", "1",
    "--set", "retrieval+refine.search.problems=1", "--set", "retrieval+refine.tried=8",
    "--set", "retrieval+refine.search.margin=1", "--set", "retrieval+refine.search.candidates=2",
]  # fmt: skip


def test_a_comparison_from_profiles_to_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    methods = ["--methods", "retrieval,retrieval+refine", "--profile", "shipped=embedded"]
    command = ["compare", "embedded", *methods, *OPTIONS, "-o", str(output)]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"wrote {output}/report.md" in result.output
    folder = output / "embedded"
    profile = load_profile(folder / "retrieval-s0.json")
    assert profile.provenance.method == "retrieval"
    refined = load_profile(folder / "retrieval+refine-s0.json")
    assert refined.provenance.config["start"]["sha256"] == profile.sha256()
    assert json.loads((folder / "retrieval+refine-s0.cost.json").read_text())["cpu_seconds"] > 0

    # The answers are those of the model with these heads split.
    model, tokenizer, _ = load_model("embedded")
    task = get_task("hops")
    split = HeadSplit(allocate(profile.gates, 0.4).full, profile.sink, profile.window)
    sampling = Sampling(max_tokens=150, temperature=0, seed=1000)
    problems = task.problems(5, 1000)
    expected = solve(model, tokenizer, task, problems, split=split, sampling=sampling)
    found = json.loads((output / "compare.json").read_text())["models"]["embedded"]
    (row,) = (row for row in found["runs"] if row["method"] == "retrieval")
    answers = found["answers"][row["digests"]["0.4"]]
    assert answers["correct"] == "".join("01"[right] for right in expected.correct)
    assert answers["output_lengths"] == list(expected.output_tokens)
    text = (output / "report.md").read_text()
    for method in ("full cache", "retrieval", "retrieval+refine", "shipped"):
        assert f"| `{method}` |" in text

    before = (output / "compare.json").read_bytes()
    again = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert again.exit_code == 0
    assert (output / "compare.json").read_bytes() == before, "nothing is measured again"
