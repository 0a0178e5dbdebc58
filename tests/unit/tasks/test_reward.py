"""Rewards of the user's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import Problem, get_task, is_solved, skip_note
from rlkv_vllm.tasks.task import Task
from tests.support.profiles import assert_one_line

HERE = __name__
SEEN: list[dict[str, Any]] = []
VALUE: list[Any] = []
CONSTANT = 3


def record(completion: str, answer: str, messages: list[dict[str, str]], **extra: Any) -> float:
    SEEN.append({"completion": completion, "answer": answer, "messages": messages, **extra})
    return 0.25


def value(completion: str, answer: str, messages: list[dict[str, str]], **extra: Any) -> Any:
    return VALUE[-1]


def fails(completion: str, **others: Any) -> float:
    return 1 / len(completion[:0])


def without_extra(completion: str, answer: str, messages: list[dict[str, str]]) -> float:
    return 1.0


def takes_one(completion: str) -> float:
    return 1.0


async def later(**arguments: Any) -> float:
    return 1.0


class Judge:
    @staticmethod
    def likes(completion: str, **others: Any) -> bool:
        return "please" in completion


@pytest.fixture
def rewarded(tmp_path: Path) -> Callable[[str], Task]:
    rows = [
        {"prompt": "How much is " + "x" * 80, "answer": "#### 7", "level": 2, "messages": "mine"},
        {"prompt": "?", "answer": None, "level": 2},
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return lambda reward: get_task(str(path), reward=reward)


def only(task: Task) -> Problem:
    return task.problems(1, 0)[0]


@pytest.mark.parametrize("path", [f"{HERE}:record", f"{HERE}.record"])
def test_it_gets_everything(rewarded: Callable[[str], Task], path: str) -> None:
    task = rewarded(path)
    SEEN.clear()
    assert task.name == "sums"
    assert task.score("<think> hm </think> 7", only(task)) == 0.25
    question = {"role": "user", "content": "How much is " + "x" * 80}
    assert [
        {
            "completion": "<think> hm </think> 7",
            "answer": "7",
            "messages": [question],
            "level": 2,
        }
    ] == SEEN
    note = skip_note(task)
    assert note is not None
    assert "1 row skipped" in note


def test_functions_inside_classes(rewarded: Callable[[str], Task]) -> None:
    task = rewarded(f"{HERE}:Judge.likes")
    assert is_solved(task, "please", only(task))
    assert not is_solved(task, "now", only(task))


def test_the_testbed_has_no_extra() -> None:
    task = get_task("chain", reward=f"{HERE}:without_extra")
    assert task.score("", only(task)) == 1


@pytest.mark.parametrize(
    ("given", "score"),
    [(True, 1), (False, 0), (0, 0), (1.0, 1), (np.float32(0.5), 0.5), (np.bool_(True), 1)],
)
def test_values(rewarded: Callable[[str], Task], given: Any, score: float) -> None:
    VALUE.append(given)
    task = rewarded(f"{HERE}:value")
    got = task.score("", only(task))
    assert got == score
    assert type(got) is float


@pytest.mark.parametrize(
    "given", [float("nan"), 1.0001, -0.1, float("inf"), None, "1", [1], np.array([0.5, 0.5]), 1j]
)
def test_bad_values(rewarded: Callable[[str], Task], given: Any) -> None:
    VALUE.append(given)
    task = rewarded(f"{HERE}:value")
    with pytest.raises(RlkvError) as error:
        task.score("", only(task))
    assert_one_line(error.value, f"reward {HERE}:value: returned ", "return a number in [0, 1]")


@pytest.mark.filterwarnings("ignore:coroutine")
def test_promises_are_no_values(rewarded: Callable[[str], Task]) -> None:
    task = rewarded(f"{HERE}:later")
    with pytest.raises(RlkvError, match="returned <coroutine"):
        task.score("", only(task))


def test_exceptions_are_told(rewarded: Callable[[str], Task]) -> None:
    task = rewarded(f"{HERE}:fails")
    with pytest.raises(RlkvError) as error:
        task.score("7", only(task))
    start = ("How much is " + "x" * 80)[:57] + "..."
    assert_one_line(error.value, f"reward {HERE}:fails", "ZeroDivisionError (division", start)
    assert "x" * 46 not in str(error.value)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nonsense", ["not a function: give package.module:function"]),
        (":f", ["not a function"]),
        ("", ["not a function"]),
        ("no.such.module:f", ["cannot be imported", "ModuleNotFoundError"]),
        (f"{HERE}:gone", ["cannot be imported", "AttributeError", "gone"]),
        (f"{HERE}:CONSTANT", ["a int, not a function"]),
        (f"{HERE}:takes_one", ["does not take", "completion, answer, messages", "level"]),
        (f"{HERE}:without_extra", ["does not take", "level", "**extra"]),
        ("not a name:f", ["cannot be imported"]),
    ],
)
def test_bad_functions(rewarded: Callable[[str], Task], path: str, parts: list[str]) -> None:
    with pytest.raises(RlkvError) as error:
        rewarded(path)
    assert_one_line(error.value, f"reward {path}", *parts)


def test_modules_of_the_current_folder(
    rewarded: Callable[[str], Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    (tmp_path / "my_rewards_of_here.py").write_text("def half(**given):\n    return 0.5\n")
    (tmp_path / "my_broken_rewards.py").write_text("raise OSError('no\\nlicence')\n")
    task = rewarded("my_rewards_of_here:half")
    assert task.score("", only(task)) == 0.5
    with pytest.raises(RlkvError) as error:
        rewarded("my_broken_rewards:half")
    assert_one_line(error.value, "OSError: no licence")
