"""Profiles come from strangers: they are data, of a bounded size, from where the user said."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import MAX_FILE_BYTES, read_json_object
from rlkv_vllm.profile import hub, lookup
from rlkv_vllm.profile.io import load_profile, profile_text
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.profile.published import import_published
from tests.support.profiles import assert_one_line, make_profile


class _TouchesWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_no_profile_and_runs_nothing(tmp_path: Path) -> None:
    content = pickle.dumps(_TouchesWhenUnpickled(tmp_path / "ran"))
    pickle.loads(content)  # what a careless reader would do
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    for name in ("p.json", "full_attention_heads.tsv"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RlkvError):
        find_profile(str(tmp_path / "p.json"))
    with pytest.raises(RlkvError):
        import_published(tmp_path / "full_attention_heads.tsv", make_profile().model)
    assert not (tmp_path / "ran").exists()


def _import(path: Path) -> object:
    return import_published(path, make_profile().model)


@pytest.mark.parametrize("name", ["p.json", "adapter_weights.tsv"])
def test_no_more_than_the_limit_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:  # sparse: a gigabyte that takes no disk
        stream.truncate(2**30)
    read = load_profile if name.endswith(".json") else _import
    tracemalloc.start()
    with pytest.raises(RlkvError, match="larger than 16 MiB"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_FILE_BYTES


def test_deep_nesting_and_long_numbers_are_told(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content in ('{"a":' * 10**5 + "1" + "}" * 10**5, '{"a": ' + "9" * 10**5 + "}"):
        path.write_text(content)
        with pytest.raises(RlkvError) as caught:
            read_json_object(path)
        assert_one_line(caught.value, "p.json")


@pytest.mark.parametrize(
    "name",
    [
        "org/repo:../other/p.json",
        "org/repo:a/../../p.json",
        "org/repo:/etc/passwd",
        "org/repo:..\\p.json",
        "org/repo@../../x",
        "org/repo@/tmp",
    ],
)
def test_names_stay_inside_the_repository(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "download", reached)
    with pytest.raises(RlkvError) as caught:
        find_profile(name)
    assert_one_line(caught.value, name.partition("@")[0].partition(":")[0])


@pytest.mark.parametrize("name", ["../embedded", "runs/../embedded", "/embedded", "embedded.json"])
def test_packaged_names_are_no_paths(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "embedded.json").write_text(profile_text(make_profile()))
    monkeypatch.setattr(lookup, "packaged_folders", lambda: (tmp_path / "inside",))
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(RlkvError):
        find_profile(name)


def test_what_a_profile_says_of_itself_stays_text(tmp_path: Path) -> None:
    """Paths, templates and code in its free fields are kept as they are, and nothing else."""
    raw = json.loads(profile_text(make_profile()))
    raw["provenance"]["config"] = {"__reduce__": "os.system", "path": "../../etc/passwd"}
    raw["provenance"]["source"] = "{{ 7 * 7 }} $(touch ran) `touch ran`"
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    profile = load_profile(path)
    assert profile.provenance.source == raw["provenance"]["source"]
    assert profile.provenance.config == raw["provenance"]["config"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
