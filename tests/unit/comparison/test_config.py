"""What `rlkv compare` is asked to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.comparison.config import (
    CompareConfig,
    Method,
    read_methods,
    read_models,
    read_seeds,
)
from rlkv_vllm.errors import RlkvError
from tests.support.profiles import assert_one_line


def test_methods_are_scorers_refinements_and_files_in_order() -> None:
    found = read_methods(
        "random, batch=rlkv, random+refine",
        ["mine=runs/{model}/s{seed}.json", "one=a=b.json"],
        ["batch.advantage=batch", "random+refine.search.problems=8"],
    )
    assert list(found) == ["random", "batch", "random+refine", "mine", "one"]
    assert found["random"] == Method("random", scorer="random")
    assert found["batch"] == Method("batch", scorer="rlkv", settings={"advantage": "batch"})
    refined = Method("random+refine", start="random", settings={"search": {"problems": 8}})
    assert found["random+refine"] == refined
    assert found["mine"].path("base", 3) == Path("runs/base/s3.json")
    assert found["mine"].seeds([0, 3]) == [0, 3]
    assert found["one"].path("base", None) == Path("a=b.json")
    assert found["one"].seeds([0, 3]) == [None], "one file for all seeds"


@pytest.mark.parametrize(
    ("names", "patterns", "changes", "parts"),
    [
        ("guess", [], [], ["--methods guess: no such method", "random", "+refine"]),
        ("mine=guess", [], [], ["--methods mine=guess: no such method"]),
        ("random,random", [], [], ["random is there already", "another label"]),
        ("random", ["random=x.json"], [], ["--profile random=x.json", "there already"]),
        ("a.b=random", [], [], ["a.b is no label", "letters"]),
        ("=random", [], [], ["nothing is no label"]),
        ("random+refine", [], [], ["random is not compared: add it to --methods"]),
        ("", ["x.json"], [], ["--profile x.json: give LABEL=PATTERN", "{seed}"]),
        ("", ["x="], [], ["give LABEL=PATTERN"]),
        (" , ", [], [], ["nothing to compare", "--profile"]),
        ("random", [], ["guess.steps=3"], ["--set guess: give LABEL.key=value", "random"]),
        ("random", [], ["random=3"], ["--set random", "LABEL.key=value"]),
        ("", ["a=x.json"], ["a.steps=3"], ["--set a", "there is none"]),
    ],
)
def test_wrong_methods_are_refused(
    names: str, patterns: list[str], changes: list[str], parts: list[str]
) -> None:
    with pytest.raises(RlkvError) as error:
        read_methods(names, patterns, changes)
    assert_one_line(error.value, *parts)


def test_models_have_labels() -> None:
    found = read_models(["embedded", "org/Some-Model.1", "base=/folder/x", "/folder/y/"])
    assert found == {
        "embedded": "embedded",
        "Some-Model-1": "org/Some-Model.1",
        "base": "/folder/x",
        "y": "/folder/y/",
    }
    for names, part in ((["a/x", "b/x"], "two models are called x"), (["b/c=x"], "is no label")):
        with pytest.raises(RlkvError, match=part):
            read_models(names)


def test_seeds() -> None:
    assert read_seeds("0,2,1") == [0, 2, 1]
    for text in ("", "1,1", "-1", "a", "2147483647", "1.5"):
        with pytest.raises(RlkvError, match=r"--seeds .*e\.g\. 0,1,2"):
            read_seeds(text)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"reference": "guess"}, ["--reference guess: is not compared", "choose from random"]),
        ({"problem_seed": 2}, ["--problem-seed 2: is one of --seeds"]),
        ({"sparsities": (0.0, 0.4)}, ["--sparsities 0", "above 0"]),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], parts: list[str]) -> None:
    options: dict[str, Any] = {
        "models": {"embedded": "embedded"},
        "methods": read_methods("random"),
        "reference": "random",
        "output": Path("out"),
    }
    with pytest.raises(RlkvError) as error:
        CompareConfig(**(options | changes))
    assert_one_line(error.value, *parts)
