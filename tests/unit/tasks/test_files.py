"""Tasks of JSON-lines files."""

import json
from pathlib import Path

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import Problem, get_task, is_solved, skip_note
from tests.support.profiles import assert_one_line


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
        (r'{"prompt": "\ud800", "answer": "a"}', "give a text, or a list of chat messages"),
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


@pytest.mark.parametrize("answer", ['""', "true", "null", '" "', "NaN", "[1]", '"#### "'])
def test_unusable_answers_are_skipped_and_counted(tmp_path: Path, answer: str) -> None:
    name = write(tmp_path / "gaps.jsonl", GOOD, f'{{"prompt": "q", "answer": {answer}}}', GOOD)
    task = get_task(name)
    assert [problem.answer for problem in task.problems(2, 0)] == ["a", "a"]
    assert len(getattr(task, "skipped")) == 1  # noqa: B009
    note = skip_note(task)
    assert note is not None
    assert note.startswith("task gaps: 1 row skipped, the first one: line 2: answer ")
    assert "\n" not in note
    with pytest.raises(RlkvError) as error:
        get_task(write(tmp_path / "none.jsonl", f'{{"prompt": "q", "answer": {answer}}}'))
    assert_one_line(error.value, "none.jsonl: holds no problem (rows skipped: 1", "line 1: answer")


def test_a_clean_file_has_nothing_to_tell(tmp_path: Path) -> None:
    assert skip_note(get_task(write(tmp_path / "clean.jsonl", GOOD))) is None


def test_columns_have_names(tmp_path: Path) -> None:
    line = json.dumps({"question": "3+4?", "solution": "3+4=7\n#### 7", "level": 2})
    name = write(tmp_path / "sums.jsonl", line)
    task = get_task(name, prompt_column="question", answer_column="solution")
    (problem,) = task.problems(1, 0)
    assert problem == Problem([{"role": "user", "content": "3+4?"}], "7")
    assert problem.extra == {}
    assert is_solved(task, "<think> 3+4 </think> It is 7.0", problem)
    assert not is_solved(task, "<think> 3+4 is 7", problem)
    with pytest.raises(RlkvError) as error:
        get_task(name, answer_column="gold")
    assert_one_line(
        error.value,
        "no column prompt and gold (it has: question, solution, level)",
        "set prompt_column or answer_column",
    )


def test_a_curriculum_is_a_task(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "u"}]
    line = json.dumps({"messages": messages, "answer": "a", "extra": {}})
    task = get_task(write(tmp_path / "curriculum.jsonl", line), prompt_column="messages")
    assert task.problems(1, 0) == [Problem(messages, "a")]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [{"prompt": "one\u2028two\x85", "answer": "1"}, {"prompt": "three", "answer": "3"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    prompts = {problem.messages[0]["content"] for problem in get_task(str(path)).problems(2, 0)}
    assert prompts == {"one\u2028two\x85", "three"}


def test_draws_depend_on_the_seed(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": str(i), "answer": i}) for i in range(50)]
    task = get_task(write(tmp_path / "many.jsonl", *lines))
    first, second = task.problems(20, 0), task.problems(20, 1)
    assert first != second
    assert first == task.problems(20, 0)
    assert len({problem.answer for problem in first}) == 20
