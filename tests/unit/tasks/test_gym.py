"""Tasks of reasoning-gym."""

import json

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import Problem, Task, get_task, gym, is_solved
from rlkv_vllm.tasks.checker import CHECKER
from tests.support.profiles import assert_one_line

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def task() -> Task:
    return get_task("gym:leg_counting")


def test_right_answers_are_solved(task: Task) -> None:
    assert task.name == "gym:leg_counting"
    for problem in task.problems(3, 0):
        assert is_solved(task, f"<think> 1 </think> <answer>{problem.answer}</answer>", problem)
        assert is_solved(task, f"So the answer is **{problem.answer}**.", problem)
        assert not is_solved(task, f"<answer>{int(problem.answer) + 1}</answer>", problem)
        assert task.score(f"<think> <answer>{problem.answer}</answer>", problem) == 0
        assert problem.messages[0]["content"].endswith(gym.INSTRUCTION)


def test_seeds_have_problems_of_their_own(task: Task) -> None:
    # In reasoning-gym itself, problem 1 of seed 0 is problem 0 of seed 1.
    prompts = [str(p.messages) for seed in (0, 1, 2) for p in task.problems(10, seed)]
    assert len(set(prompts)) == 30
    assert task.problems(10, 1) == task.problems(10, 1)
    assert task.problems(0, 0) == []


def test_another_process_draws_the_same() -> None:
    # Goes through sets of words, whose order differs from process to process.
    task = get_task("gym:ransom_note")
    drawn = task.problems(5, 3)
    CHECKER.close()
    assert task.problems(5, 3) == drawn


@pytest.mark.parametrize("name", ["rearc", "mini_sudoku", "countdown"])
def test_problems_survive_a_file(name: str) -> None:
    task = get_task(f"gym:{name}")
    (problem,) = task.problems(1, 5)
    row = json.loads(json.dumps([problem.messages, problem.answer, problem.extra]))
    again = Problem(*row)
    assert is_solved(task, f"<answer>\n{problem.answer}\n</answer>", again)
    assert not is_solved(task, "<answer>((( 9**9**9**9**9</answer>", again)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(RlkvError) as error:
        get_task("gym:leg_count")
    assert_one_line(error.value, "task gym:leg_count: unknown", "did you mean gym:leg_counting")
    with pytest.raises(RlkvError) as error:
        get_task("gym:qqqqzzzz")
    assert_one_line(error.value, "task gym:qqqqzzzz: unknown", "gallery")
    with pytest.raises(RlkvError) as error:
        get_task("gym:composite")
    assert_one_line(error.value, "task gym:composite", "choose another one")


def test_reasoning_gym_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(RlkvError) as error:
        get_task("gym:leg_counting")
    assert_one_line(error.value, "pip install 'rlkv-vllm[gym]'")
