"""`rlkv refine` on the embedded model, with a few answers each."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.options import override, validate
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.search.config import RefineConfig
from rlkv_vllm.search.job import run
from rlkv_vllm.search.model import SplitModel
from rlkv_vllm.training.run import Listener
from rlkv_vllm.training.solver import Solver
from tests.support.profiles import assert_one_line, make_profile

#: As flags of the command line.
CHANGES = [
    "tried=12", "batch_size=3", "sampling.max_tokens=150", "sampling.temperature=1",
    "search.sparsities=[.5]", "search.problems=2", "search.margin=2", "search.candidates=4",
    "search.answers=2",
    "evaluation.problems=4", "evaluation.sparsities=[.2]",
]  # fmt: skip


def config(output: Path, *changes: str, **content: Any) -> RefineConfig:
    task = {"name": "hops"}
    given = {"profile": "embedded", "model": "embedded", "task": task, "output": str(output)}
    return validate(RefineConfig, override(given | content, [*CHANGES, *changes]), "test", "docs")


def result(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "refine.json").read_text())
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(config(output))
    return output


def test_a_run_leaves_profile_and_report(finished: Path) -> None:
    profile, (given, _) = load_profile(finished / "profile.json"), find_profile("embedded")
    found = result(finished)["result"]
    assert profile.provenance.method == f"{given.provenance.method}+refine"
    settings = profile.provenance.config
    assert (settings["p"], settings["answers"]) == (found["p"], found["answers"])
    assert settings["search"]["margin"] == 2
    assert found["evaluations"] == len(result(finished)["losses"]) > 2
    assert settings["start"]["sha256"] == given.sha256()
    assert (profile.sink, profile.window) == (given.sink, given.window)
    assert sorted(chain(*profile.gates)) == pytest.approx(sorted(chain(*given.gates)), abs=1e-4)
    assert [row.sparsity for row in profile.evaluation] == [0.0, 0.2]
    assert {(row.temperature, row.seed) for row in profile.evaluation} == {
        (1, profile.provenance.seed + 1)
    }
    report = (finished / "report.html").read_text()
    assert "Refinement" in report
    assert "Not in this report" not in report


def test_a_killed_run_goes_on_as_without(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"

    def dying(method: Callable[..., Any], calls: int) -> Callable[..., Any]:
        left = iter(range(calls))

        def call(*args: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return method(*args)

        return call

    for name, calls in (("write_answers", 0), ("cross_entropy", 3), ("solve", 0), ("solve", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(SplitModel, name, dying(getattr(SplitModel, name), calls))
            with pytest.raises(KeyboardInterrupt):
                run(config(output), resume=output.exists())
    before = result(output)
    assert before["solved"]
    assert len(before["own_answers"]) == 2
    assert "result" not in before
    with pytest.raises(RlkvError, match="give --resume to continue it"):
        run(config(output))
    for change, words in (
        ("search.margin=1", "search.margin 2 there, 1 here"),
        ("window=8", "span [4, 16] there, [4, 8] here"),
        ("sampling.top_p=0.5", "top_p 1.0 there, 0.5 here"),
        ("seed=1", "seed 0 there, 1 here"),
    ):
        with pytest.raises(RlkvError, match="has other settings") as caught:
            run(config(output, change), resume=True)
        assert_one_line(caught.value, words, "choose another --output")
    assert result(output) == before
    said: list[str] = []
    stages: set[str] = set()
    listener = Listener(report=lambda stage, *_: stages.add(stage), say=said.append)
    run(config(output), resume=True, listener=listener)
    assert (output / "refine.json").read_bytes() == (finished / "refine.json").read_bytes()
    gates = [load_profile(folder / "profile.json").gates for folder in (output, finished)]
    assert gates[0] == gates[1]
    assert stages == {"search", "sparsity 0", "sparsity 0.2"}, "no cross-entropy again"
    count = result(output)["result"]["answers"]
    assert any(f"search: {count} answers, the" in line for line in said)


def test_two_processes_ask_for_the_same_answers(tmp_path: Path) -> None:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlkv_vllm"]
    options = ["--model", "embedded", "--task", "hops", "--output", str(tmp_path / "two")]
    changes = [*CHANGES, "sampling.temperature=0"]
    for change in changes:
        options += ["--set", change]
    subprocess.run(
        [sys.executable, "-m", *launch, "refine", "embedded", *options],
        check=True,
        timeout=600,
        capture_output=True,
    )
    run(config(tmp_path / "one", *changes))
    found = [result(tmp_path / name) for name in ("one", "two")]
    assert found[0]["result"] == found[1]["result"]
    assert found[0]["solved"] == found[1]["solved"]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before any work."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(Solver, "load", fail)


@pytest.mark.usefixtures("no_model")
def test_a_wrong_start_is_refused_at_once(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(RlkvError) as caught:
        run(config(output, profile=str(tmp_path / "missing.json")))
    assert_one_line(caught.value, "missing.json")
    other = tmp_path / "other.json"
    other.write_text(make_profile().model_dump_json(exclude_none=True))
    with pytest.raises(RlkvError, match=r"made for|layers|model") as caught:
        run(config(output, profile=str(other)))
    assert_one_line(caught.value)
    with pytest.raises(RlkvError, match="all or none stream"):
        run(config(output, "search.sparsities=[0, 1]"))
    with pytest.raises(RlkvError, match="task nothing: unknown"):
        run(config(output, "task.name=nothing"))
    assert not output.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metrics.jsonl", "holds a run of `rlkv train`"),
        ("run.yaml", "give --resume"),
        ("refine.json", "give --resume"),
    ],
)
def test_another_run_is_not_overwritten(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(RlkvError) as caught:
        run(config(tmp_path))
    assert_one_line(caught.value, f"--output {tmp_path}", words)
    with pytest.raises(RlkvError, match="is a file"):
        run(config(tmp_path / name))
