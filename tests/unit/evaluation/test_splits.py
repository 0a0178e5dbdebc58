"""Labels of the profiles and rows of the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.splits import FULL, STREAMING, concerns, find_candidates, plan
from rlkv_vllm.profile.io import save_profile
from tests.support.profiles import assert_one_line, make_profile, random_gates


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_profile(make_profile(), "one.json")
    save_profile(make_profile(gates=random_gates(4, 2, seed=1)), "two.json")
    save_profile(make_profile(window=32), "narrow.json")
    for name in ("a", "b"):
        Path(name).mkdir()
        save_profile(make_profile(), f"{name}/profile.json")
    save_profile(make_profile(), "x=y.json")
    return tmp_path


def test_labels() -> None:
    names = ["one.json", "a/profile.json", "mine too=two.json", "x=y.json"]
    assert list(find_candidates(names)) == ["one", "head-importance", "mine too", "x=y"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["one.json", "one.json"], ["all are called one", "LABEL=one.json"]),
        (["a/profile.json", "b/profile.json"], ["head-importance", "a/profile.json"]),
        (["x=one.json", "x=two.json"], ["called x"]),
        ([f"{FULL}=one.json"], ["baseline"]),
        ([f"{STREAMING} 1+2=one.json"], ["baseline"]),
        (["nowhere.json"], ["nowhere.json"]),
        (["x=nowhere.json"], ["nowhere.json"]),
    ],
)
def test_labels_that_clash(names: list[str], parts: list[str]) -> None:
    with pytest.raises(RlkvError) as error:
        find_candidates(names)
    assert_one_line(error.value, *parts)


def test_baselines_are_planned_once_whatever_is_asked_for() -> None:
    candidates = find_candidates(["one.json", "two.json"])
    for shares in ([0.5, 0.25], [0.25, 0.5, 0, 1, 0.5]):
        splits = plan(candidates, shares)
        assert [(split.label, split.sparsity) for split in splits] == [
            (FULL, 0),
            ("one", 0.25),
            ("one", 0.5),
            ("two", 0.25),
            ("two", 0.5),
            (STREAMING, 1),
        ]
    assert splits[0].allocation.full == ((0, 1),) * 4
    assert splits[-1].allocation.full == ((),) * 4
    assert sum(map(len, splits[1].allocation.full)) == 6
    own = [split.label for split in splits if concerns(split, "two", candidates["two"])]
    assert own == [FULL, "two", "two", STREAMING]


def test_each_window_has_its_own_streaming_baseline() -> None:
    candidates = find_candidates(["one.json", "narrow.json", "two.json"])
    splits = plan(candidates, [0.5])
    streaming = [split for split in splits if split.sparsity == 1]
    assert [split.label for split in streaming] == [f"{STREAMING} 16+64", f"{STREAMING} 16+32"]
    assert sum(split.sparsity == 0 for split in splits) == 1
    narrow = candidates["narrow"]
    assert [concerns(split, "narrow", narrow) for split in streaming] == [False, True]
    same = find_candidates(["one.json", "narrow.json"], sink=2, window=8)
    splits = plan(same, [0.5])
    assert splits[-1].label == STREAMING
    assert splits[-1].choice.engine_config()["window"] == 8


def test_digests_are_equal_where_serving_is() -> None:
    one, two, narrow = (
        plan(find_candidates([f"{n}.json"]), [0.5]) for n in ("one", "two", "narrow")
    )
    assert one[0].digest == two[0].digest == narrow[0].digest  # no window in a full cache
    assert one[2].digest == two[2].digest != narrow[2].digest
    assert len({one[1].digest, two[1].digest, narrow[1].digest}) == 3
    copy = plan(find_candidates(["a/profile.json"]), [0.5])
    assert copy[1].digest == one[1].digest
