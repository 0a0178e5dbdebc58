"""The report of a run: self-contained, whatever part of the run is there."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.training import report
from rlkv_vllm.training.report import write_report
from tests.support.profiles import assert_one_line, make_profile

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a test asks of a page; refuses what is not nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.images: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "action") if name in values]
        assert not any(name.startswith("on") for name in values)
        if tag == "img":
            data = values["src"].removeprefix("data:image/svg+xml;base64,")
            svg = base64.b64decode(data, validate=True).decode()
            ElementTree.fromstring(svg)
            assert not re.search(r'(href|src)="(?!#|data:)', svg)
            self.images[values["alt"]] = svg
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


def make_run(folder: Path, steps: int = 30, layers: int = 4, heads: int = 2) -> Path:
    folder.mkdir()
    rng = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "gates.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            table = [[rng.random() for _ in range(heads)] for _ in range(layers)]
            row = {
                "step": step,
                "reward": rng.random(),
                "reward_std": rng.random(),
                "penalty": 0.02,
                "gate_mean": rng.random(),
                "gate_low": 0.1,
                "gate_high": 0.2,
                "output_tokens": 100 * rng.random(),
                "clipped": 0.0,
                "elapsed": 60.0 * step,
            }
            metrics.write(json.dumps(row) + "\n")
            log.write(json.dumps({"step": step, "gates": table}) + "\n")
    rows = [
        EvaluationRow(
            task="sums",
            n=100,
            sparsity=sparsity,
            accuracy=accuracy,
            full_accuracy=0.97,
            mean_output_tokens=80.5,
            p95_output_tokens=99,
            capped_share=0.125,
        )
        for sparsity, accuracy in ((0, 0.97), (0.4, 0.96), (0.5, 0.5), (1, 0.0))
    ]
    profile = make_profile(layers, heads, evaluation=rows, recommended_sparsity=0.4)
    save_profile(profile, folder / "profile.json")
    figures = {"tried": 64, "kept": 61, "mean_tokens": 115.828125, "sha256": "c37e84"}
    (folder / "curriculum.json").write_text(json.dumps(figures))
    (folder / "run.yaml").write_text(
        "# Written by: rlkv train job.yaml\nmodel: org/model\nseed: 0\n"
    )
    return folder


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of the time."""
    svg = base64.b64encode(b"<svg/>").decode()

    def data_uri(figure: Figure) -> str:
        assert figure.axes
        return f"data:image/svg+xml;base64,{svg}"

    monkeypatch.setattr(report, "data_uri", data_uri)


def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    assert path.stat().st_size < 400_000
    found = Page(path.read_text())
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert all(link.startswith("data:") for link in found.links)
    return found


def test_a_complete_run(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    for words in (
        "Head profile of org/model by head-importance",
        "2026-01-02",
        "30 steps, 30.0 minutes of training",
        "Recommended: sparsity 0.4",
        "0.902-0.984",  # of 96 in 100
        "-0.470",
        "12.5%",
        "115.8",
        "c37e84",
        "rlkv train job.yaml",
        "seed: 0",
        "torch 2.13",
    ):
        assert words in found.text, words
    assert "Not in this report" not in found.text
    assert [alt.split()[0] for alt in found.images] == [
        "Accuracy",
        "Reward,",
        "Mean",
        "Every",
        "Gates",
    ]
    heads = found.images["Gates by layer and KV head"]
    assert "sparsity 0.4" in heads  # the recommended one
    assert "for a loss of 2 points, together with all smaller ones." in found.text


def test_a_refinement(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Refinement" not in page(run).text
    row = {"sparsity": 0.4, "given": 0.625, "found": 0.75}
    row |= {"become_streaming": [[3, 1]], "become_full": [[2, 0]]}
    result = {"p": 0.0312, "is_taken": True, "rows": [row]}
    (run / "refine.json").write_text(json.dumps({"result": result, "solved": {}}))
    found = page(run)
    for words in ("Refinement", "layer 3 head 1", "layer 2 head 0", "0.625", "0.750", "p 0.031"):
        assert words in found.text, words
    assert "The found heads are taken" in found.text
    assert "Not in this report" not in found.text
    result["is_taken"] = False
    (run / "refine.json").write_text(json.dumps({"result": result, "solved": {}}))
    assert "The gates are kept" in page(run).text


@pytest.mark.usefixtures("no_drawing")
def test_a_run_of_rlkv_refine_lacks_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").unlink()
    (run / "gates.jsonl").unlink()
    assert "there is no metrics.jsonl" in page(run).text
    (run / "refine.json").write_text('{"result": {"p": 0.5, "is_taken": false, "rows": []}}')
    found = page(run)
    assert "Not in this report" not in found.text
    assert len(found.images) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"solved": {}}', "the refinement: it is not finished"),
        ('{"result": {"rows": 3', "refine.json cannot be read"),
        ('{"result": {"rows": [3, {"become_full": 4}]}}', "Refinement"),
        ('{"result": 3}', None),
    ],
)
def test_a_refinement_cut_short_or_damaged(tmp_path: Path, text: str, words: str | None) -> None:
    run = make_run(tmp_path / "run")
    (run / "refine.json").write_text(text)
    found = page(run).text
    assert words in found if words else "Refinement" not in found


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("name", "words", "pictures"),
    [
        ("profile.json", "there is no profile.json", 3),
        ("metrics.jsonl", "there is no metrics.jsonl", 3),
        ("gates.jsonl", "there is no gates.jsonl", 4),
        ("curriculum.json", "there is no curriculum.json", 5),
        ("run.yaml", "there is no run.yaml", 5),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, words: str, pictures: int) -> None:
    run = make_run(tmp_path / "run", steps=4)
    (run / name).unlink()
    found = page(run)
    assert "Not in this report" in found.text
    assert words in found.text
    assert len(found.images) == pictures


@pytest.mark.parametrize(
    "name", ["profile.json", "metrics.jsonl", "gates.jsonl", "curriculum.json", "run.yaml"]
)
def test_one_file_is_enough(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", steps=1)
    for path in run.iterdir():
        if path.name != name:
            path.unlink()
    found = page(run)
    assert found.text.count("there is no") == 4


def test_a_profile_without_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    save_profile(make_profile(evaluation=[], recommended_sparsity=None), run / "profile.json")
    found = page(run)
    assert "the profile has no evaluation rows" in found.text
    assert "for a loss of 2 points" not in found.text
    assert "sparsity 0.5, where nothing is recommended" in found.text


@pytest.mark.usefixtures("no_drawing")
def test_the_model_of_an_unfinished_run_comes_from_its_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    (run / "profile.json").unlink()
    assert "Run of org/model by rlkv" in page(run).text
    (run / "run.yaml").write_text("model: [\n")
    assert "an unknown model" in page(run).text


def damage(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(change((run / name).read_text())) and None


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (damage("metrics.jsonl", lambda text: text[:-9]), "1 line"),
        (damage("metrics.jsonl", lambda text: "null\n3\n{}\n" + text), "3 lines"),
        (damage("metrics.jsonl", lambda text: ""), None),
        (damage("gates.jsonl", lambda _: '{"step": 3, "gates": [[1, "x"]]}\n'), None),
        (damage("gates.jsonl", lambda text: text + '{"step": 9, "gates": [[1]]}\n'), None),
        (damage("profile.json", lambda text: text[:-50]), "not valid JSON"),
        (damage("curriculum.json", lambda text: text[:-5]), "curriculum.json cannot be read"),
        (damage("curriculum.json", lambda text: "[3]"), None),
        (lambda run: (run / "run.yaml").write_bytes(b"\xff\xfe\xff"), "run.yaml cannot be read"),
    ],
)
def test_damaged_files_leave_the_rest(
    tmp_path: Path, hurt: Callable[[Path], Any], words: str | None
) -> None:
    run = make_run(tmp_path / "run", steps=5)
    hurt(run)
    found = page(run)
    assert len(found.images) >= 3
    assert words is None or words in found.text


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    rows = [
        {"step": 1, "reward": math.nan, "penalty": None, "clipped": "x", "elapsed": math.inf},
        {"step": 2, "reward": 0.5, "penalty": None, "clipped": True, "elapsed": None},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = page(run)
    curves = found.images["Reward, penalty, output tokens and share cut off over the steps"]
    assert ">reward<" in curves
    assert ">penalty<" not in curves
    assert ">share cut off<" not in curves


@pytest.mark.usefixtures("no_drawing")
def test_steps_done_again_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.5, "elapsed": 1.0}\n')
    assert "5 steps, 5.0 minutes" in page(run).text


def test_many_heads_and_steps_stay_small(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run", steps=400, layers=36, heads=8))
    assert "layer (8 KV heads each)" in found.images["Every gate over the steps"]


@pytest.mark.usefixtures("no_drawing")
def test_nothing_in_the_files_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    evil = '<script>alert("1")</script><img src=x onerror=y>&amp;'
    (run / "run.yaml").write_text(f"# {evil}\nmodel: '{evil}'\n")
    (run / "curriculum.json").write_text(json.dumps({"sha256": evil, "kept": [evil]}))
    profile = make_profile(recommended_sparsity=None)
    changes = {
        "model": profile.model.model_copy(update={"id": evil}),
        "provenance": profile.provenance.model_copy(update={"method": evil, "data": evil}),
        "evaluation": [profile.evaluation[0].model_copy(update={"task": evil})],
    }
    save_profile(profile.model_copy(update=changes), run / "profile.json")
    assert page(run).text.count(evil) >= 6
    (run / "profile.json").unlink()
    assert evil in page(run).text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RlkvError) as error:
        write_report(tmp_path)
    assert_one_line(error.value, "holds nothing of a run", "rlkv train")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RlkvError) as error:
        write_report(tmp_path / "nowhere")
    assert_one_line(error.value, "nowhere", "no such folder")
