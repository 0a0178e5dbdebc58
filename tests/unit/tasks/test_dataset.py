"""Tasks of data sets that `datasets` reads; none of them from a network."""

from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import dataset, get_task, is_solved, skip_note
from tests.support.profiles import assert_one_line

datasets = pytest.importorskip("datasets")

ROWS: dict[str, list[Any]] = {
    "question": ["3+4?", "half?", "none?", "", "capital?"],
    "answer": ["3+4\n#### 7", r"$\frac{1}{2}$", None, "5", "Paris"],
    "level": [1, 2, 3, 4, 5],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: dict[str, list[Any]] = ROWS) -> str:
    table = datasets.Dataset.from_dict(rows)
    writers = {".parquet": table.to_parquet, ".csv": table.to_csv, ".jsonl": table.to_json}
    writers[path.suffix](str(path))
    return f"datasets:{path}"


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_local_files(tmp_path: Path, suffix: str) -> None:
    task = get_task(write(tmp_path / f"mine{suffix}"), prompt_column="question")
    assert task.name == "mine"
    problems = {problem.answer: problem for problem in task.problems(3, 0)}
    assert {answer: problem.messages for answer, problem in problems.items()} == {
        "7": [{"role": "user", "content": "3+4?"}],
        r"$\frac{1}{2}$": [{"role": "user", "content": "half?"}],
        "Paris": [{"role": "user", "content": "capital?"}],
    }
    assert all(problem.extra == {} for problem in problems.values())
    assert task.problems(3, 0) == task.problems(3, 0)
    assert is_solved(task, "<think> </think> **Paris**", problems["Paris"])
    note = skip_note(task)
    assert note is not None
    assert note.startswith("task mine: 2 rows skipped, the first one: row 2: answer None")
    with pytest.raises(RlkvError) as error:
        task.problems(4, 0)
    assert_one_line(error.value, "holds 3 problems, 4 are wanted")


def test_formulas_are_compared_as_such(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    task = get_task(write(tmp_path / "a.parquet"), prompt_column="question")
    (half,) = (problem for problem in task.problems(3, 0) if "half" in str(problem.messages))
    assert is_solved(task, r"<think> hm </think> It is \boxed{0.5}.", half)
    assert not is_solved(task, r"<think> hm </think> It is \boxed{0.25}.", half)
    assert not is_solved(task, r"<think> hm, it is \boxed{0.5}.", half)


def test_a_folder_with_splits_and_chats(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    write(folder / "train.parquet", {"prompt": [chat], "answer": [1.0]})
    write(folder / "test.parquet", {"prompt": [chat, chat], "answer": [2.5, None]})
    (problem,) = get_task(f"datasets:{folder}").problems(1, 0)
    assert (problem.messages, problem.answer) == (chat, "1")
    test = get_task(f"datasets:{folder}", split="test[:1]")
    assert [problem.answer for problem in test.problems(1, 0)] == ["2.5"]
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{folder}", split="validation")
    assert_one_line(error.value, "split validation", "['train', 'test']", "check the name")


def test_bad_local_data(tmp_path: Path) -> None:
    name = write(tmp_path / "a.csv")
    with pytest.raises(RlkvError) as error:
        get_task(name, answer_column="gold")
    assert_one_line(
        error.value,
        "a.csv (split train): no column prompt and gold",
        "question, answer, level",
        "set prompt_column or answer_column",
    )
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{tmp_path / 'gone.parquet'}")
    assert_one_line(error.value, "gone.parquet: no such file or folder")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{tmp_path / 'notes.txt'}")
    assert_one_line(error.value, "give one of .parquet, .csv")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{tmp_path / 'bad.parquet'}")
    assert_one_line(error.value, "bad.parquet (split train): cannot be loaded")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{tmp_path / 'empty'}")
    assert_one_line(error.value, "empty (split train): cannot be loaded", "data files")
    empty = write(tmp_path / "none.parquet", {"prompt": ["a", "b"], "answer": ["", "#### "]})
    with pytest.raises(RlkvError) as error:
        get_task(empty)
    assert_one_line(error.value, "holds no problem (rows skipped: 2", "row 0: answer ''")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("imdb", ("imdb", None)),
        ("openai/gsm8k", ("openai/gsm8k", None)),
        ("openai/gsm8k/main", ("openai/gsm8k", "main")),
        ("org/name/a/b", ("org/name", "a/b")),
    ],
)
def test_names_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[str, str | None]
) -> None:
    called = []

    def load(*args: Any, **options: Any) -> Any:
        called.append((args, options))
        return datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["1"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = get_task(f"datasets:{name}", split="test")
    assert called == [(arguments, {"split": "test"})]
    assert task.name == name


@pytest.mark.parametrize(
    ("raised", "parts"),
    [
        (ConnectionError("Couldn't reach 'a/b'"), ["cannot be reached", "check the network"]),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't\nexist"),
            ["cannot be loaded (Dataset 'a/b' doesn't exist)", "ORG/NAME/CONFIG"],
        ),
        (ValueError("Config name is missing: ['main']"), ["['main']", "ORG/NAME/CONFIG"]),
    ],
)
def test_what_the_hub_says_is_told(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, parts: list[str]
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RlkvError) as error:
        get_task("datasets:a/b")
    assert_one_line(error.value, "task datasets:a/b", *parts)


@pytest.mark.parametrize("name", ["", "a/", "a//b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(RlkvError) as error:
        get_task(f"datasets:{name}")
    assert_one_line(error.value, "not a name: give ORG/NAME")


def test_datasets_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "find_spec", lambda name: None)
    with pytest.raises(RlkvError) as error:
        get_task("datasets:a/b")
    assert_one_line(error.value, "pip install 'rlkv-vllm[train]'")
