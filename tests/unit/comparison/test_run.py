"""Comparisons with answers that are known: a problem needs one head."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.comparison import cost, making, run
from rlkv_vllm.comparison.config import CompareConfig, read_methods
from rlkv_vllm.comparison.measuring import Answers
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answers import HeadSplit
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.profile import HeadProfile, Provenance
from rlkv_vllm.profile.io import load_profile, save_profile
from rlkv_vllm.scorers.run import ScoreConfig
from rlkv_vllm.tasks import Problem
from rlkv_vllm.tasks.measurement import Measurement
from tests.support import profiles
from tests.support.profiles import assert_one_line, random_gates

LAYERS, KV_HEADS, N = 5, 4, 40


def solved(split: HeadSplit | None) -> list[bool]:
    """Problem i needs the full cache of head i, counted over all layers."""
    heads = [divmod(i % (LAYERS * KV_HEADS), KV_HEADS) for i in range(N)]
    return [split is None or head in split.full_heads[layer] for layer, head in heads]


class Model:
    """Stands in for a loaded model; dies at the call `dies_at`."""

    def __init__(self) -> None:
        self.loaded = 0
        self.asked: list[HeadSplit | None] = []
        self.dies_at: int | None = None

    def load(
        self, model: str, task: Any, problems: Sequence[Problem], sampling: Any, *_: Any
    ) -> Answers:
        self.loaded += 1

        def answers(
            split: HeadSplit | None, report: Callable[[int, int, str], None]
        ) -> Measurement:
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(split)
            correct = solved(split)
            report(N // 2, N, "some solved")
            report(N, N, f"{sum(correct)} solved")
            lengths = [10 if right else 30 for right in correct]
            return Measurement(correct, lengths, [not right for right in correct])

        return answers


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    fake = Model()
    monkeypatch.setattr(run, "load_answers", fake.load)
    return fake


def gates_profile(seed: int, **changes: Any) -> HeadProfile:
    return profiles.make_profile(
        model=load_model_fingerprint("embedded"),
        gates=random_gates(LAYERS, KV_HEADS, seed),
        sink=4,
        window=16,
        evaluation=[],
        **changes,
    )


@pytest.fixture
def patterns(tmp_path: Path) -> list[str]:
    """Methods a and b with seeds 0 and 1; seed 1 of both is the same; and c with one file."""
    for name, seed, gates in (("a", 0, 0), ("a", 1, 1), ("b", 0, 2), ("b", 1, 1)):
        save_profile(gates_profile(gates), tmp_path / f"embedded-{name}-s{seed}.json")
    save_profile(gates_profile(2), tmp_path / "c.json")
    (tmp_path / "c.cost.json").write_text('{"cpu_seconds": 77}')
    both = [f"{name}={tmp_path}/{{model}}-{name}-s{{seed}}.json" for name in "ab"]
    return [*both, f"c={tmp_path}/c.json"]


def config(
    output: Path, methods: str = "", patterns: Sequence[str] = (), **changes: Any
) -> CompareConfig:
    chosen = read_methods(methods, patterns)
    options: dict[str, Any] = {
        "models": {"embedded": "embedded"},
        "methods": chosen,
        "reference": next(iter(chosen)),
        "seeds": [0, 1],
        "sparsities": [0.4],
        "n": N,
        "output": output,
    }
    return CompareConfig(**(options | changes))


def content(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "compare.json").read_text())
    return found


def test_every_allocation_is_measured_once(
    tmp_path: Path, patterns: list[str], model: Model
) -> None:
    told: list[tuple[int, int, str]] = []
    files, rows = run.run(
        config(tmp_path / "out", patterns=patterns),
        command="rlkv compare",
        report=lambda stage, done, total, state="": told.append((done, total, state)),
    )
    # The full cache, seed 0 of a and of b (which is c), seed 1 of both.
    assert model.loaded == 1
    assert model.asked[0] is None
    assert len(model.asked) == 4
    assert told[-1][:2] == (4 * N, 4 * N)
    assert "min left" in told[0][2]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert [path.name for path in files] == ["compare.json", "report.md", "report.png"]
    assert all(path.exists() for path in files)
    assert [row[2] for row in rows] == ["full cache", "a", "b", "c"]
    by_method = {
        (r["method"], r["seed"]): r for r in content(tmp_path / "out")["models"]["embedded"]["runs"]
    }
    assert by_method["b", 0]["digests"] == by_method["c", None]["digests"]
    assert by_method["c", None]["cpu_seconds"] == 77
    # The same command again asks for nothing.
    run.run(config(tmp_path / "out", patterns=patterns), command="rlkv compare")
    assert (model.loaded, len(model.asked)) == (1, 4)
    assert content(tmp_path / "out")["commands"] == ["rlkv compare"]


def test_a_killed_comparison_goes_on_where_it_was(
    tmp_path: Path, patterns: list[str], model: Model
) -> None:
    run.run(config(tmp_path / "whole", patterns=patterns), command="c")
    asked, model.asked = model.asked, []
    model.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        run.run(config(tmp_path / "out", patterns=patterns), command="c")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "full cache" in report
    assert "`a`" in report
    assert "`c`" not in report.split("CPU seconds")[0], "not measured yet"
    model.dies_at = None
    run.run(config(tmp_path / "out", patterns=patterns), command="c")
    assert model.asked == asked
    ends = [(tmp_path / name / "report.md").read_text() for name in ("whole", "out")]
    assert ends[0] == ends[1]


def test_methods_and_sparsities_may_be_added(
    tmp_path: Path, patterns: list[str], model: Model
) -> None:
    run.run(config(tmp_path / "out", patterns=patterns[:1]), command="1")
    assert len(model.asked) == 3
    wanted = config(tmp_path / "out", patterns=patterns[:2], sparsities=[0.4, 0.5])
    run.run(wanted, command="2")
    # a at .5 twice, b at both, whose seed 1 is that of a.
    assert len(model.asked) == 3 + 2 + 2
    assert content(tmp_path / "out")["commands"] == ["1", "2"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n": N - 1}, ["compare.json", f"n {N} there, {N - 1} here", "--fresh"]),
        ({"problem_seed": 7}, ["problem_seed 1000 there, 7 here"]),
        ({"samples": 2}, ["--samples 2: greedy decoding", "a --temperature above 0"]),
        ({"samples": 2, "sampling": {"temperature": 1}}, ["samples 1 there, 2 here"]),
        ({"task": "hops"}, ['task "embedded" there, "hops" here']),
        ({"max_new_tokens": 9}, ["model embedded has other settings", "max_tokens 512 there, 9"]),
        ({"sampling": {"temperature": 0.5}}, ["sampling.temperature 0.0 there, 0.5 here"]),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], parts: list[str], tmp_path: Path, patterns: list[str], model: Model
) -> None:
    run.run(config(tmp_path / "out", patterns=patterns), command="c")
    before = (tmp_path / "out" / "compare.json").read_bytes()
    with pytest.raises(RlkvError) as error:
        run.run(config(tmp_path / "out", patterns=patterns, **changes), command="c")
    assert_one_line(error.value, *parts)
    assert (tmp_path / "out" / "compare.json").read_bytes() == before
    assert len(model.asked) == 4


def test_fresh_measures_again(tmp_path: Path, patterns: list[str], model: Model) -> None:
    run.run(config(tmp_path / "out", patterns=patterns), command="c")
    run.run(config(tmp_path / "out", patterns=patterns), command="c", fresh=True)
    assert len(model.asked) == 8


def test_answers_that_were_changed_by_hand_are_refused(
    tmp_path: Path, patterns: list[str], model: Model
) -> None:
    run.run(config(tmp_path / "out", patterns=patterns), command="c")
    found = content(tmp_path / "out")
    next(iter(found["models"]["embedded"]["answers"].values()))["correct"] = "01"
    (tmp_path / "out" / "compare.json").write_text(json.dumps(found))
    with pytest.raises(RlkvError) as error:
        run.run(config(tmp_path / "out", patterns=patterns), command="c")
    assert_one_line(error.value, "answers of model embedded", "do not fit each other", "--fresh")


def test_a_profile_that_is_missing_or_of_another_model_stops_before_anything(
    tmp_path: Path, patterns: list[str], model: Model
) -> None:
    with pytest.raises(RlkvError) as error:
        run.run(config(tmp_path / "out", patterns=patterns, seeds=[0, 1, 2]), command="c")
    assert_one_line(error.value, "--profile a=", "embedded-a-s2.json: no such file")
    save_profile(profiles.make_profile(), tmp_path / "other.json")
    with pytest.raises(RlkvError) as error:
        run.run(config(tmp_path / "out", patterns=[f"x={tmp_path}/other.json"]), command="c")
    assert_one_line(error.value, "--profile x=", "does not fit model embedded")
    (tmp_path / "c.cost.json").write_text('{"cpu_seconds": "many"}')
    with pytest.raises(RlkvError) as error:
        run.run(config(tmp_path / "out", patterns=patterns), command="c")
    assert_one_line(error.value, "c.cost.json: cpu_seconds 'many': must be a number")
    assert model.loaded == 0


def test_problems_that_a_profile_was_made_from_are_left_out(tmp_path: Path, model: Model) -> None:
    made = Provenance(
        method="x", source=None, config={}, seed=1000, versions={}, created="2026-11-29"
    )
    jobs = [
        {"task": "embedded", "n": 3},
        {"task": {"name": "embedded"}, "curriculum": {"problems": 5}},
        {"task": "hops", "n": 9},
        {
            "task": {"name": "embedded"},
            "tried": 2,
            "seed": 5,
            "start": {"config": {"task": "embedded", "n": 4, "seed": 1000}},
        },
    ]
    for place, job in enumerate(jobs):
        provenance = made.model_copy(update={"config": job})
        save_profile(gates_profile(place, provenance=provenance), tmp_path / f"{place}.json")
    given = [f"m{place}={tmp_path}/{place}.json" for place in range(4)]
    run.run(config(tmp_path / "out", patterns=given), command="c")
    runs = content(tmp_path / "out")["models"]["embedded"]["runs"]
    # The problems of one seed begin alike, whatever their number.
    assert [set(row["seen"]) >= {0, 1, 2} for row in runs] == [True, True, False, True]
    report = (tmp_path / "out" / "report.md").read_text()
    dropped = len({place for row in runs for place in row["seen"]})
    assert 5 <= dropped < N
    assert f"{N - dropped} fresh problems ({dropped} others were left out" in " ".join(
        report.split()
    )
    used_up = made.model_copy(update={"config": {"task": "embedded", "n": N}})
    save_profile(gates_profile(9, provenance=used_up), tmp_path / "9.json")
    with pytest.raises(RlkvError, match=f"made from all {N} problems: change --problem-seed"):
        run.run(config(tmp_path / "o", patterns=[f"x={tmp_path}/9.json"]), command="c")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ScoreConfig]:
    """The scorings that were asked for; their gates depend on the seed."""
    asked: list[ScoreConfig] = []

    def make_profile(wanted: ScoreConfig, report: Any, say: Any, *, work: Path) -> HeadProfile:
        assert work.parent.name == "embedded"
        asked.append(wanted)
        report("scoring", 1, 2)
        return gates_profile(10 + wanted.seed)

    monkeypatch.setattr(making, "make_profile", make_profile)
    return asked


def test_profiles_are_made_once_for_every_seed(
    tmp_path: Path, model: Model, made: list[ScoreConfig]
) -> None:
    wanted = config(tmp_path / "out", "retrieval,random", score_n=9, max_new_tokens=50)
    run.run(wanted, command="c")
    order = [("retrieval", 0), ("random", 0), ("retrieval", 1), ("random", 1)]
    assert [(one.method, one.seed) for one in made] == order
    assert {(one.n, one.max_new_tokens, one.evaluate) for one in made} == {(9, 50, 0)}
    folder = tmp_path / "out" / "embedded"
    assert load_profile(folder / "random-s1.json").gates == gates_profile(11).gates
    assert cost.read_cost(folder / "random-s1.json").cpu_seconds is not None
    run.run(wanted, command="c")
    assert len(made) == 4
    # One that was interrupted is made again, the others are not.
    (folder / "random-s1.json").unlink()
    run.run(wanted, command="c")
    assert len(made) == 5
    other = config(tmp_path / "out", "retrieval,random", score_n=8, max_new_tokens=50)
    with pytest.raises(RlkvError) as error:
        run.run(other, command="c")
    assert_one_line(error.value, "retrieval-s0.cost.json: has other settings (n 9 there, 8 here)")


def test_settings_of_methods_are_checked_first(tmp_path: Path, made: list[ScoreConfig]) -> None:
    methods = read_methods("random,steps=self-distill", (), ["steps.pace=3"])
    wanted = CompareConfig({"embedded": "embedded"}, methods, "random", tmp_path / "out")
    with pytest.raises(RlkvError) as error:
        run.run(wanted, command="c")
    assert_one_line(error.value, "--set pace: self-distill has no such setting")
    assert not made
    assert not (tmp_path / "out").exists()


def test_a_refinement_starts_from_the_profile_of_its_seed(
    tmp_path: Path, model: Model, made: list[ScoreConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    from rlkv_vllm.search import job

    jobs: list[Any] = []

    def refine(wanted: Any, *, resume: bool, listener: Any) -> HeadProfile:
        assert resume
        jobs.append(wanted)
        given = load_profile(wanted.profile)
        return given.model_copy(update={"gates": [row[::-1] for row in given.gates]})

    monkeypatch.setattr(job, "run", refine)
    methods = read_methods("random,random+refine", (), ["random+refine.search.problems=8"])
    wanted = CompareConfig(
        {"embedded": "embedded"},
        methods,
        "random",
        tmp_path / "out",
        seeds=[0, 1],
        sparsities=[0.4],
        n=N,
        max_new_tokens=99,
    )
    run.run(wanted, command="c")
    assert [Path(one.profile).name for one in jobs] == ["random-s0.json", "random-s1.json"]
    assert [one.seed for one in jobs] == [0, 1]
    assert jobs[0].search.model_dump(include={"problems", "sparsities"}) == {
        "problems": 8,
        "sparsities": [0.4],
    }
    assert (jobs[0].sampling.max_tokens, jobs[0].evaluation.problems) == (99, 0)
    run.run(wanted, command="c")
    assert len(jobs) == 2


def test_the_cost_of_interrupted_work_that_continues_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkv_vllm.store import Store

    clock = [0.0]
    monkeypatch.setattr(cost, "cpu_seconds", lambda: clock[0])
    monkeypatch.setattr(cost.time, "monotonic", lambda: 2 * clock[0])
    path = tmp_path / "p.cost.json"
    for total in (30.0, 60.0):
        meter = cost.Meter(Store(path, cost.FORMAT, {}))
        clock[0] += 1
        meter.tick()  # too early for a note
        clock[0] += 29
        meter.tick()
        clock[0] += 5  # killed: lost
        assert cost.read_cost(tmp_path / "p.json") == cost.Cost(total, 2 * total)
    meter.note(is_finished=True)
    cost.Meter(Store(path, cost.FORMAT, {})).note()
    assert cost.read_cost(tmp_path / "p.json") == cost.Cost(0, 0), "made anew"
