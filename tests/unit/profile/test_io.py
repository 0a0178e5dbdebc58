import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkv_vllm import files
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import read_json_object, write_bytes_atomic, write_text_atomic
from rlkv_vllm.models import fingerprint_from_config, load_model_fingerprint
from rlkv_vllm.profile.io import check_matches, load_profile, profile_text, save_profile
from tests.support.profiles import assert_one_line, make_model_dir, make_profile

TEXT = profile_text(make_profile())


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "p.json"
    save_profile(make_profile(), path)
    assert load_profile(path) == make_profile()
    assert re.search(r"^    \[0\.\d+, 0\.\d+\],$", path.read_text(), re.MULTILINE)


def fails_to_load(path, content, *parts):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RlkvError) as caught:
        load_profile(path)
    assert_one_line(caught.value, str(path), *parts)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"sink": 16', '"sink": NaN', ["NaN"]),
        ('"sink": 16', '"sink": -Infinity', ["-Infinity"]),
        ('"sink": 16', '"sink": 1e999', ["1e999"]),
        ('"sink": 16', '"sink": 16, "sink": 17', ['"sink"', "twice"]),
        ('"sink": 16', '"sink": "16"', ["sink '16'"]),
        ('"sink": 16', '"sink": true', ["sink True"]),
        ('"sink": 16', '"sunk": 16', ["sink", "1 more"]),
        ('"schema_version": 1', '"schema_version": 7', ["schema_version 7", "reads 1", "install"]),
        ('"schema_version": 1', '"schema_version": "1"', ["schema_version"]),
        ('"schema_version": 1,', "", ["no integer schema_version"]),
        ('"created": "2026-01-02"', '"created": "soon"', ["provenance.created"]),
        ('"model_type": "qwen3"', '"model_type": "\\ud800"', ["JSON"]),
        ('"num_layers": 4', '"num_layers": 5', ["4 rows", "num_layers is 5"]),
        ('"num_kv_heads": 2', '"num_kv_heads": 1', ["row 0 has 2 columns"]),
    ],
)
def test_wrong_field(tmp_path, old, new, parts):
    assert old in TEXT
    fails_to_load(tmp_path / "p.json", TEXT.replace(old, new, 1), *parts)


@pytest.mark.parametrize("value", ["1.5", "-0.01", '"0.5"', "null", "[]"])
def test_wrong_gate_is_named_by_layer_and_head(tmp_path, value):
    raw = json.loads(TEXT)
    raw["gates"][2][1] = json.loads(value)
    fails_to_load(tmp_path / "p.json", json.dumps(raw), "layer 2, KV head 1", "[0, 1]")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x04pickle", "UTF-8"),
        (b"[1]", "holds a JSON array"),
        (b"null", "holds null, expected an object"),
        (b"7", "holds a JSON number"),
        (b"\xef\xbb\xbf{}", "byte-order mark: save it as UTF-8 without one"),
        ("{}".encode("utf-16"), "not UTF-8 text (byte 0): save it as UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b" " * (files.MAX_FILE_BYTES + 1), "larger than 16 MiB"),
    ],
)
def test_not_a_profile_at_all(tmp_path, content, part):
    fails_to_load(tmp_path / "p.json", content, part)


def test_truncated_at_every_length(tmp_path):
    path = tmp_path / "p.json"
    for length in range(len(TEXT.rstrip())):
        path.write_text(TEXT[:length])
        with pytest.raises(RlkvError) as caught:
            load_profile(path)
        assert_one_line(caught.value, str(path))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_text_never_raises_anything_else(tmp_path, data):
    start = data.draw(st.integers(0, len(TEXT) - 1))
    end = data.draw(st.integers(start, min(len(TEXT), start + 12)))
    middle = data.draw(st.text(alphabet='0123456789eE+-.,:"[]{}nulINaty\\ \n\x00é', max_size=8))
    path = tmp_path / "p.json"
    path.write_text(TEXT[:start] + middle + TEXT[end:])
    try:
        profile = load_profile(path)
    except RlkvError as error:
        assert_one_line(error, str(path))
    else:
        assert all(0 <= gate <= 1 for row in profile.gates for gate in row)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    where=st.integers(0, 30),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
def test_any_value_anywhere_never_raises_anything_else(tmp_path, where, value):
    raw = json.loads(TEXT)
    places = [(record, key) for record in _records(raw) for key in _keys(record)]
    record, key = places[where * 7 % len(places)]
    record[key] = value
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    try:
        profile = load_profile(path)
    except RlkvError as error:
        assert_one_line(error, str(path))
    else:
        save_profile(profile, path)
        assert load_profile(path) == profile


def _records(value):
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _records(item)


def _keys(record):
    return list(record) if isinstance(record, dict) else range(len(record))


def test_missing_and_no_plain_file(tmp_path):
    for path, part in ((tmp_path / "none.json", "no such file"), (tmp_path, "not a plain file")):
        with pytest.raises(RlkvError) as caught:
            load_profile(path)
        assert_one_line(caught.value, str(path), part)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    save_profile(make_profile(), path)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)  # chmod does not stop root
    with pytest.raises(RlkvError) as caught:
        load_profile(path)
    assert_one_line(caught.value, str(path), "Permission denied")


def test_file_name_with_a_newline_stays_one_line(tmp_path):
    path = tmp_path / "a\nb.json"
    path.write_text("{")
    with pytest.raises(RlkvError) as caught:
        load_profile(path)
    assert_one_line(caught.value, "a b.json")


def test_write_replaces_or_leaves_everything(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("old")
    synced = []

    def fail_second(handle):
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail_second)
    with pytest.raises(RlkvError) as caught:
        write_bytes_atomic({first: b"new", second: b"new"})
    assert_one_line(caught.value, str(second), "No space left")
    assert first.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    monkeypatch.undo()
    write_bytes_atomic({first: b"new", second: b"new"})
    assert (first.read_text(), second.read_text()) == ("new", "new")


def test_write_follows_links_and_refuses_folders(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_text_atomic(link, "x")
    assert link.is_symlink()
    assert target.read_text() == "x"
    with pytest.raises(RlkvError, match="not a plain file"):
        write_text_atomic(tmp_path, "x")


def test_read_json_object_keeps_plain_values(tmp_path):
    (tmp_path / "a").write_text('{"a": [1, 2.5, null, true, "é"]}')
    assert read_json_object(tmp_path / "a") == {"a": [1, 2.5, None, True, "é"]}


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "head_dim": 32,
}


def test_fingerprint_from_config():
    fingerprint = fingerprint_from_config(CONFIG, "m", "rev")
    assert fingerprint.model_dump() == {
        "id": "m",
        "revision": "rev",
        "model_type": "llama",
        "num_layers": 3,
        "num_query_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 32,
    }
    older = {k: v for k, v in CONFIG.items() if k not in ("head_dim", "num_key_value_heads")}
    fingerprint = fingerprint_from_config(older | {"head_dim": None}, "m")
    assert (fingerprint.head_dim, fingerprint.num_kv_heads) == (64, 8)
    nested = {"model_type": "outer", "num_hidden_layers": 99, "text_config": CONFIG}
    assert fingerprint_from_config(nested, "m", "rev") == fingerprint_from_config(
        CONFIG, "m", "rev"
    )


def test_fingerprint_from_a_config_object():
    from types import SimpleNamespace

    config = SimpleNamespace(to_dict=lambda: CONFIG)
    assert fingerprint_from_config(config, "m") == fingerprint_from_config(CONFIG, "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", None), ("model_type", 3), ("num_hidden_layers", 0)]
    + [("num_attention_heads", value) for value in (None, "8", True, 2**31)],
)
def test_fingerprint_names_the_missing_key(key, value):
    with pytest.raises(RlkvError) as caught:
        fingerprint_from_config(CONFIG | {key: value}, "m")
    assert_one_line(caught.value, key, "model m")


def test_load_model_fingerprint(tmp_path):
    folder = make_model_dir(tmp_path / "tiny")
    assert load_model_fingerprint(str(folder)).id == "tiny"
    (tmp_path / "empty").mkdir()
    for model, part in ((tmp_path / "empty", "no config.json"), ("nowhere", "neither a folder")):
        with pytest.raises(RlkvError) as caught:
            load_model_fingerprint(str(model))
        assert_one_line(caught.value, str(model), part)


def test_check_matches_names_every_field(tmp_path):
    profile = make_profile()
    check_matches(profile, load_model_fingerprint(str(make_model_dir(tmp_path / "other-name"))))
    other = make_model_dir(tmp_path / "wrong", layers=5, head_dim=32, model_type="llama")
    with pytest.raises(RlkvError) as caught:
        check_matches(profile, load_model_fingerprint(str(other)))
    assert_one_line(
        caught.value,
        "num_layers is 4 in the profile and 5 in the model",
        "head_dim is 64 in the profile and 32 in the model",
        "model_type",
        "wrong",
    )
    assert "num_kv_heads" not in str(caught.value)
