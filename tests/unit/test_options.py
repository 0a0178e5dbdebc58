"""Options from YAML files and `--set`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, JsonValue

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.options import Section, override, read_options, save_options, validate
from tests.support.profiles import assert_one_line


class Inner(Section):
    rate: float = 0.1


class Options(Section):
    name: str = "a"
    inner: Inner = Inner()
    more: dict[str, JsonValue] = Field(default={})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1_000", -1000),
        ("0x10", 16),
        ("1e-2", 0.01),
        ("1E5", 1e5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("off", False),
        ("null", None),
        ("", None),
        ("[.4, .5]", [0.4, 0.5]),
        ("{a: 1e1}", {"a": 10.0}),
        ("[a, b]", ["a", "b"]),
        # Not numbers: YAML 1.1 makes 62 of the first, a date of another.
        ("1:2", "1:2"),
        ("[1:2]", ["1:2"]),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("=", "="),
        ("'1'", "1"),
        ("a=b", "a=b"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        # Nothing is looked up.
        ("${seed}", "${seed}"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("a${b", "a${b"),
        ("???", "???"),
    ],
)
def test_values_are_plain_yaml(tmp_path: Path, text: str, value: Any) -> None:
    found = override({"seed": 1}, [f"a.b={text}"])
    assert found == {"seed": 1, "a": {"b": value}}
    assert type(found["a"]["b"]) is type(value)
    path = tmp_path / "job.yaml"
    path.write_text(f"a: {text}\n")
    assert read_options(path, "options") == {"a": value}


def test_options_are_changed_in_turn_and_the_given_ones_stay() -> None:
    given = {"a": {"b": 1, "c": 2}}
    assert override(given, ["a.b=3", "a.d.e=4", "f=5", "f=6"]) == {
        "a": {"b": 3, "c": 2, "d": {"e": 4}},
        "f": 6,
    }
    assert override(given, ["a=x"]) == {"a": "x"}
    assert override({"a": None}, ["a.b=1"]) == {"a": {"b": 1}}
    assert given == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a", "give key=value"),
        ("=1", "give key=value"),
        ("a.=1", "give key=value"),
        ("seed.more=1", "seed is no section"),
        ("a=[", "value is not YAML"),
        ("a=!!python/object/apply:os.system [true]", "value is not YAML"),
        ("a=\x00", "value is not YAML"),
        ("a=" + "[" * 9999, "value is not YAML"),
        ("a=0x_", "value is not YAML"),
        ("a={b: 1, b: 2}", "key b is given twice"),
    ],
)
def test_bad_changes_are_named(change: str, words: str) -> None:
    with pytest.raises(RlkvError) as caught:
        override({"seed": 1}, [change], "--change")
    assert_one_line(caught.value, "--change", words)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    try:
        found = override({}, [f"a={text}"])["a"]
    except RlkvError as error:
        assert_one_line(error, "--set")
    else:
        assert json.loads(json.dumps(found)) == found or found != found


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=9)
    | st.sampled_from(["1e-2", "1:2", "2026-01-01", "=", "yes", "1", "0x10", ".5", "~", "${a}"])
)
def test_saved_options_are_read_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    options = Options(name=text, inner=Inner(rate=1e-5), more={"list": [1, text, 1e20]})
    save_options(options, path)
    assert validate(Options, read_options(path, "options"), "run.yaml", "docs") == options
    assert "# Versions: rlkv-vllm" in path.read_text()


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(RlkvError) as caught:
        validate(Options, {"inner": {"rate": "much"}}, "job.yaml", "docs/train.md")
    assert_one_line(caught.value, "job.yaml: inner.rate", "'much'", "docs/train.md")
    with pytest.raises(RlkvError) as caught:
        validate(Options, {"colour": 1}, "job.yaml", "docs/train.md")
    assert_one_line(caught.value, "colour: Extra inputs are not permitted")
    path = tmp_path / "job.yaml"
    for text, words in (("a: [", "not valid YAML"), ("- 1", "no mapping"), ("[" * 9999, "YAML")):
        path.write_text(text)
        with pytest.raises(RlkvError) as caught:
            read_options(path, "the options")
        assert_one_line(caught.value, "job.yaml", words)
    with pytest.raises(RlkvError, match="no such file"):
        read_options(tmp_path / "none.yaml", "the options")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RlkvError, match="pipe: not a plain file"):
        read_options(tmp_path / "pipe", "the options")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 1\n", "a", "1 and 3"),
        ("a:\n  b:\n  - c: 1\n    'c': 2\n", "c", "3 and 4"),
        ("a: {b: 1, b: 1}\n", "b", "1 and 1"),
        ("1: a\n0x1: b\n", "1", "1 and 2"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1,\n d: 2}\n", "d", "2 and 3"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, key: str, lines: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(RlkvError) as caught:
        read_options(path, "the options")
    assert_one_line(caught.value, "job.yaml", f"key {key} is given twice, in lines {lines}")


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}\n")
    assert read_options(path, "the options") == {"a": {"b": 1}, "c": {"b": 2}}
