"""Tasks, their files, and what counts as a correct answer."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkv_vllm.cli.testbed import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.tasks import Problem, final_answer, get_task, is_correct
from rlkv_vllm.testbed.problems import FAMILIES, make_problems


@pytest.mark.parametrize("name", [*FAMILIES, "embedded"])
def test_families_are_tasks(name: str) -> None:
    task = get_task(name)
    made = make_problems(None if name == "embedded" else name, 6, seed=1)
    assert task.name == name
    assert task.problems(6, seed=1) == [
        Problem([{"role": "user", "content": problem.prompt}], problem.answer) for problem in made
    ]
    assert all(task.check(problem.completion, problem.answer) for problem in made)
    wrong = str((int(made[0].answer) + 1) % 10)
    assert not task.check(made[0].completion, wrong)
    cut = made[0].completion.rpartition(" </think>")[0]
    assert not task.check(cut, made[0].answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> a: +3 3 </think> answer 3", "3"),
        ("<think> x </think> answer 4 </think> answer 7", "7"),
        ("thinking without a start </think>\nThe final answer is: **42**.", "42"),
        ("Answer: 1,200", "1200.0"),
        (r"<think>\boxed{1}</think> so \boxed{2} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("It leaves early.\n\nParis.\n", "paris"),
        ("answer 3\nanswer\n", "3"),
    ],
)
def test_correct_answers(text: str, answer: str) -> None:
    assert is_correct(text, answer)
    assert not is_correct(text, "99")


@pytest.mark.parametrize("text", ["", "<think> 7", "<think> 7 </think>", " \n ", "\\boxed{7"])
def test_outputs_without_an_answer(text: str) -> None:
    assert not is_correct(text, "7")


def test_final_answer_of_an_unfinished_thought_is_none() -> None:
    assert final_answer("<think> the answer is 7") is None


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_file_is_a_task(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    name = write(
        tmp_path / "mine.jsonl",
        json.dumps({"prompt": "one?", "answer": 1}),
        "",
        json.dumps({"prompt": chat, "answer": "two", "source": "x"}),
        json.dumps({"prompt": "three?", "answer": 3.5}),
    )
    task = get_task(name)
    assert task.name == "mine"
    by_answer = {problem.answer: problem.messages for problem in task.problems(3, seed=0)}
    assert by_answer == {
        "1": [{"role": "user", "content": "one?"}],
        "two": chat,
        "3.5": [{"role": "user", "content": "three?"}],
    }
    assert task.problems(3, seed=0) == task.problems(3, seed=0)
    with pytest.raises(RlkvError, match=r"mine\.jsonl: holds 3 problems, 4 are wanted"):
        task.problems(4, seed=0)


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"}', "no column answer"),
        ('{"question": "p"}', r"no column prompt and answer \(it has: question\)"),
        ('{"prompt": "p", "answer": ', "not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"prompt": " ", "answer": "a"}', "give a text, or a list of chat messages"),
        ('{"prompt": [], "answer": "a"}', "give a text, or a list of chat messages"),
        ('{"prompt": [{"role": "user"}], "answer": "a"}', "list of chat messages"),
        ('{"prompt": "p", "answer": ""}', "give a text or a number"),
        ('{"prompt": "p", "answer": true}', "give a text or a number"),
        ('{"prompt": "p", "answer": null}', "give a text or a number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    name = write(tmp_path / "bad.jsonl", GOOD, line, GOOD)
    with pytest.raises(RlkvError, match=rf"bad\.jsonl, line 2: .*{message}") as caught:
        get_task(name)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RlkvError, match=r"gone\.jsonl: no such file"):
        get_task(str(tmp_path / "gone.jsonl"))
    with pytest.raises(RlkvError, match=r"empty\.jsonl: holds no problem"):
        get_task(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RlkvError, match="not UTF-8 text"):
        get_task(str(tmp_path / "latin.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RlkvError, match="cannot be read"):
        get_task(str(tmp_path / "folder.jsonl"))


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(RlkvError, match="task gsm9k: unknown, choose one of embedded, chain"):
        get_task("gsm9k")


def test_samples_are_a_task_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample", "--task", "hops", "--n", "3", "--seed", "9"])
    assert result.exit_code == 0
    lines = get_task(write(tmp_path / "hops.jsonl", result.output)).problems(3, seed=0)
    fresh = get_task("hops").problems(3, seed=9)
    assert {p.messages[0]["content"]: p.answer for p in lines} == {
        p.messages[0]["content"]: p.answer for p in fresh
    }


def test_sample_refuses_an_unknown_task() -> None:
    result = CliRunner().invoke(app, ["sample", "--task", "golf"])
    assert isinstance(result.exception, RlkvError)
    assert "--task golf: unknown, choose one of chain" in str(result.exception)
