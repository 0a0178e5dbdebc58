import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import Problem
from rlkv_vllm.tasks.measurement import Measurement
from rlkv_vllm.training.curriculum import Curriculum, make_curriculum
from rlkv_vllm.training.solver import Solver


class Numbers:
    """Problem i is solved if i is even."""

    name = "numbers"

    def problems(self, n: int, seed: int) -> list[Problem]:
        return [
            Problem([{"role": "user", "content": f"{i}\u2028"}], str(i), {"i": i}) for i in range(n)
        ]

    def score(self, text: str, problem: Problem) -> float:
        return 1.0


class Model:
    """Stands for `solve`; dies before batch `dies_at`."""

    def __init__(self, odd_only: bool = False, dies_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.seeds: list[int] = []
        self._odd_only = odd_only
        self._dies_at = dies_at

    def __call__(self, model: Any, tokenizer: Any, task: Any, problems: Any, **kw: Any) -> Any:
        if self._dies_at == len(self.seeds):
            raise KeyboardInterrupt
        self.seeds.append(kw["sampling"].seed)
        numbers = [int(problem.answer) for problem in problems]
        self.asked += numbers
        return Measurement.of(
            [
                Answer([2] * 10, [1] * 5, is_correct=i % 2 == 0 and not self._odd_only)
                for i in numbers
            ]
        )


def processes(rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None) -> Any:
    return SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=wait)


def make(
    output: Path, monkeypatch: pytest.MonkeyPatch, solver: Model, **options: Any
) -> Curriculum:
    monkeypatch.setattr("rlkv_vllm.training.solver.solve", solver)
    options = {"n": 20, "keep": None, "batch_size": 4, "processes": processes()} | options
    settings = options.pop("settings", {"x": 1})
    nothing: Any = None
    return make_curriculum(
        Solver(nothing, nothing, nothing, Numbers(), settings),
        output,
        sampling=Sampling(max_tokens=10, temperature=0),
        **options,
    )


def test_keeps_what_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, monkeypatch, Model())
    assert [int(problem.answer) for problem in made.problems] == list(range(0, 20, 2))
    assert made.problems[1].extra == {"i": 2}
    assert (made.tried, made.mean_tokens, made.longest, made.capped_share) == (20, 10, 15, 0)
    assert len((tmp_path / "curriculum.jsonl").read_text().split("\n")) == 11
    assert list(tmp_path.glob("*.partial*")) == []


def test_a_finished_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path, monkeypatch, Model())
    again = Model()
    assert make(tmp_path, monkeypatch, again) == first
    assert again.asked == []


def test_a_killed_one_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Model()
    (tmp_path / "straight").mkdir()
    expected = make(tmp_path / "straight", monkeypatch, straight)
    killed = tmp_path / "killed"
    killed.mkdir()
    first = Model(dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        make(killed, monkeypatch, first)
    partial = killed / "curriculum.partial.0.json"
    assert len(json.loads(partial.read_text())["rows"]) == 8
    (killed / ".curriculum.partial.0.json.tmp").write_text('{"rows": [')  # cut off by the kill
    second = Model()
    assert make(killed, monkeypatch, second) == expected
    assert first.asked + second.asked == straight.asked
    assert first.seeds + second.seeds == straight.seeds


def test_stops_when_enough_are_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = Model()
    made = make(tmp_path, monkeypatch, solver, keep=3)
    assert len(made.problems) == 3
    assert len(solver.asked) == 8


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solvers = [Model(), Model()]

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path, monkeypatch, solvers[1], processes=processes(1, 2, stop))
    made = make(tmp_path, monkeypatch, solvers[0], processes=processes(0, 2))
    assert sorted(solvers[0].asked + solvers[1].asked) == list(range(20))
    assert [int(problem.answer) for problem in made.problems] == list(range(0, 20, 2))


@pytest.mark.parametrize("keep", [4, 7, 99])
def test_processes_keep_together_what_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    # Problem i goes to process i % 2, and only process 0 solves any.
    solver = Model()
    (tmp_path / "one").mkdir()
    alone = make(tmp_path / "one", monkeypatch, solver, keep=keep)
    (tmp_path / "two").mkdir()
    barrier = threading.Barrier(2, timeout=30)

    def wait() -> None:
        barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(
                lambda rank: make(
                    tmp_path / "two",
                    monkeypatch,
                    solver,
                    keep=keep,
                    batch_size=2,
                    processes=processes(rank, 2, wait),
                ),
                range(2),
            )
        )
    assert both[0] == both[1]
    assert both[0].problems == alone.problems
    assert both[0].tried == alone.tried


def test_nothing_solved_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RlkvError, match="solves none of 20 problems"):
        make(tmp_path, monkeypatch, Model(odd_only=True))


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, monkeypatch, Model())
    with pytest.raises(
        RlkvError, match=r"curriculum\.json: .*\(x 1 there, 2 here; n 20 there, 8 here\)"
    ):
        make(tmp_path, monkeypatch, Model(), settings={"x": 2}, n=8)


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, monkeypatch, Model())
    path = tmp_path / "curriculum.jsonl"
    row = json.loads(path.read_text().split("\n")[0]) | {"answer": "7"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RlkvError, match="was changed after it was made"):
        make(tmp_path, monkeypatch, Model())
