"""The resumable store: killed anywhere, guarded by its settings, never half-written."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.store import Store, differences
from tests.support.profiles import assert_one_line

FORMAT = "rlkv test 1"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


def work(path: Path, n: int, dies_at: int | None = None) -> list[int]:
    """Squares of 0 to n - 1, each saved as it is known."""
    store = Store(path, FORMAT, {"n": n, "shape": (1, 2)})
    done: list[int] = store.content.setdefault("squares", [])
    for i in range(len(done), n):
        if i == dies_at:
            raise KeyboardInterrupt
        done.append(i * i)
        store.save()
    return done


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 6), deaths=st.lists(st.integers(0, 6), max_size=4))
def test_killed_work_ends_in_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, n: int, deaths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    for dies_at in deaths:
        with suppress(KeyboardInterrupt):
            work(folder / "killed.json", n, dies_at)
    assert work(folder / "killed.json", n) == work(folder / "whole.json", n)
    assert (folder / "killed.json").read_bytes() == (folder / "whole.json").read_bytes()


@settings(max_examples=50, deadline=None)
@given(
    first=st.dictionaries(st.text(max_size=2), PLAIN, max_size=3),
    second=st.dictionaries(st.text(max_size=2), PLAIN, max_size=3),
)
def test_other_settings_are_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, Any], second: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("store") / "file.json"
    store = Store(path, FORMAT, first)
    store.content["kept"] = 1
    store.save()
    before = path.read_bytes()
    if differences(first, second):
        with pytest.raises(RlkvError, match="has other settings") as caught:
            Store(path, FORMAT, second)
        assert_one_line(caught.value, "--output", "there", "here")
    else:
        assert Store(path, FORMAT, second).content == {"kept": 1}
    assert path.read_bytes() == before
    assert Store(path, FORMAT, second, fresh=True).content == {}


def test_differences_name_the_setting() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    assert differences(old, {"a": {"b": 2, "c": [1]}, "d": "x"}) == [
        "a.b 1 there, 2 here",
        'd null there, "x" here',
    ]
    assert differences(old, {"a": {"b": 1}}) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "rlkv other 1", "settings": {}}', "is no file of `rlkv test 1`"),
        ('{"results": []}', "is no file of"),
        ('{"format": "rlkv test 1", "settings": 3}', "is no file of"),
        ('{"format": "rlkv test 1", "sett', "not valid JSON"),
        ("[]", "expected an object"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(RlkvError) as caught:
        Store(path, FORMAT, {}, flag="--record", fix="choose another")
    assert_one_line(caught.value, "--record", words, "choose another")
    assert path.read_text() == text


def test_a_file_without_a_format_continues_by_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"settings": {"n": 1}, "kept": 3}')
    assert Store(path, FORMAT, {"n": 1}).content == {"kept": 3}


@pytest.mark.parametrize("fails_at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    path, other = tmp_path / "file.json", tmp_path / "file.csv"
    store = Store(path, FORMAT, {})
    store.save({other: b"1"})
    before = path.read_bytes()
    store.content["more"] = 2

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, fails_at, full)
        with pytest.raises(RlkvError, match="No space left"):
            store.save({other: b"2"})
    assert (path.read_bytes(), other.read_bytes()) == (before, b"1")
    assert {file.name for file in tmp_path.iterdir()} == {"file.json", "file.csv"}
    store.save({other: b"2"})
    assert json.loads(path.read_text())["more"] == 2


def test_a_reader_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    Store(path, FORMAT, {}, is_writer=False).save()
    assert not path.exists()
