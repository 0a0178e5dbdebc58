"""Tasks by name, those of the testbed, and what counts as solved."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkv_vllm.cli.testbed import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import Problem, get_task, is_solved, skip_note
from rlkv_vllm.tasks.puzzles import make_problems
from rlkv_vllm.tasks.testbed import NAMES
from tests.support.profiles import assert_one_line


@pytest.mark.parametrize("name", NAMES)
def test_families_are_tasks(name: str) -> None:
    task = get_task(name)
    problems = task.problems(6, seed=1)
    made = make_problems(None if name == "embedded" else name, 6, seed=1)
    assert task.name == name
    assert problems == [
        Problem([{"role": "user", "content": problem.prompt}], problem.answer) for problem in made
    ]
    for problem, solution in zip(problems, made, strict=True):
        assert is_solved(task, solution.completion, problem)
        other = Problem(problem.messages, str((int(problem.answer) + 1) % 10))
        assert not is_solved(task, solution.completion, other)
        cut = solution.completion.rpartition(" </think>")[0]
        assert not is_solved(task, cut, problem)


def test_extra_is_carried_but_not_compared() -> None:
    messages = [{"role": "user", "content": "?"}]
    assert Problem(messages, "1", {"a": 1}) == Problem(messages, "1")
    assert Problem(messages, "1") != Problem(messages, "2")


@pytest.mark.parametrize(("score", "solved"), [(1.0, True), (0.9991, True), (0.99, False)])
def test_nearly_right_is_not_solved(score: float, solved: bool) -> None:
    class Fixed:
        name = "fixed"

        def problems(self, n: int, seed: int) -> list[Problem]:
            return []

        def score(self, text: str, problem: Problem) -> float:
            return score

    assert is_solved(Fixed(), "", Problem([], "")) is solved
    assert skip_note(Fixed()) is None


def test_tasks_load_no_library_before_they_need_it() -> None:
    code = (
        "import sys, rlkv_vllm.tasks; print([name for name in "
        "('datasets', 'math_verify', 'reasoning_gym', 'sympy', 'torch', 'transformers') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(RlkvError) as error:
        get_task("gsm9k")
    assert_one_line(
        error.value, "task gsm9k: unknown, choose one of embedded, chain", "gym:", "datasets:"
    )


def test_samples_are_a_task_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample", "--task", "hops", "--n", "3", "--seed", "9"])
    assert result.exit_code == 0
    path = tmp_path / "hops.jsonl"
    path.write_text(result.output)
    lines = get_task(str(path)).problems(3, seed=0)
    fresh = get_task("hops").problems(3, seed=9)
    assert {p.messages[0]["content"]: p.answer for p in lines} == {
        p.messages[0]["content"]: p.answer for p in fresh
    }


def test_sample_refuses_an_unknown_task() -> None:
    result = CliRunner().invoke(app, ["sample", "--task", "golf"])
    assert isinstance(result.exception, RlkvError)
    assert "--task golf: unknown, choose one of chain" in str(result.exception)
