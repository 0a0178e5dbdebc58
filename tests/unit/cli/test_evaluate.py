"""``rlkv eval`` with a fake engine: the table, the files, and what is refused before it starts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.answers import Sampling
from rlkv_vllm.cli import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation import served
from rlkv_vllm.evaluation.looks import SHARES, nominal_levels
from rlkv_vllm.evaluation.splits import Ask, Split
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.profile.io import load_profile, save_profile
from rlkv_vllm.profile.lookup import packaged_profiles
from rlkv_vllm.tasks import Problem, get_task
from rlkv_vllm.tasks.measurement import Measurement
from tests.support.profiles import assert_one_line, make_model_dir, make_profile, random_gates

N = 10


class FakeEngine:
    """Solves fewer problems the sparser the cache is; fails on demand."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, float]] = []
        self.fails_at: float | None = None
        self.problems: list[list[Problem]] = []
        self.sampling: Sampling | None = None
        self.options: dict[str, Any] | None = None
        self.asked: list[tuple[float, int, int]] = []
        self.fails_after = 0
        self.solves = lambda sparsity, n: range(round(n * (1 - sparsity)))

    @contextmanager
    def __call__(
        self,
        model: str,
        split: Split,
        task: Any,
        problems: Sequence[Problem],
        sampling: Sampling,
        samples: int = 1,
        engine_options: dict[str, Any] | None = None,
    ) -> Iterator[Ask]:
        self.starts.append((split.label, split.sparsity))
        self.problems.append(list(problems))
        self.sampling, self.options = sampling, engine_options

        def ask(start: int, end: int) -> Measurement:
            self.asked.append((split.sparsity, start, end))
            if split.sparsity == self.fails_at and end > self.fails_after:
                raise RuntimeError("out of\nmemory")
            solved = self.solves(split.sparsity, len(problems))
            places = [i for i in range(start, end) for _ in range(samples)]
            return Measurement(
                correct=tuple(i in solved for i in places),
                output_tokens=tuple(100 + i for i in places),
                cut=tuple(i not in solved for i in places),
                seconds=5.0,
                samples=samples,
            )

        yield ask


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(served, "opened", fake)
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # leaves the logging of this process alone
    make_model_dir(tmp_path / "model")
    save_profile(make_profile(), "one.json")
    save_profile(make_profile(gates=random_gates(4, 2, seed=1)), "two.json")
    save_profile(make_profile(5, 2), "other.json")
    Path("folder").mkdir()
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", "model", "--n", str(N), *arguments])


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    return result.output


TWO = ("--profile", "one.json", "--profile", "two.json", "--sparsity", "0,.5,.25")
STARTS = [
    ("full cache", 0),
    ("one", 0.25),
    ("one", 0.5),
    ("two", 0.25),
    ("two", 0.5),
    ("all streaming", 1),
]


# --- the table ---------------------------------------------------------------------------


def test_all_rows_on_the_same_problems_baselines_once(engine: FakeEngine) -> None:
    output = ok(*TWO)
    assert engine.starts == STARTS
    assert all(problems == engine.problems[0] for problems in engine.problems)
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("[")][1] == (
        "[2/6] one, sparsity 0.25: 8 of 10 solved, 104 tokens on average (5.0 s)"
    )
    cells = [line.split() for line in lines if line.strip().startswith(("full", "two", "all"))]
    full = "full cache 0 10 1.000 0.722-1.000 - - 104 109 0.0% 0.5 -"
    assert full.split() in cells
    half = "two 0.5 10 0.500 0.237-0.763 50.0 (76.9) violated 104 109 50.0% 1 0.062"
    assert half.split() in cells
    last = next(line for line in cells if line[:3] == ["all", "streaming", "1"])
    assert last[-2:] == ["-", "0.002"]  # nothing solved: no time per solved problem


def test_sampling_reaches_the_engine_and_the_title(engine: FakeEngine) -> None:
    sampling = ("--temperature", ".6", "--top-p", ".95", "--top-k", "20", "--seed", "7")
    output = ok(*TWO, *sampling, "--max-tokens", "99")
    assert engine.sampling == Sampling(max_tokens=99, temperature=0.6, top_p=0.95, top_k=20, seed=7)
    assert "temperature 0.6, top-p 0.95, top-k 20" in output
    assert "sampling: temperature 0.6, top-p 0.95, top-k 20 (--temperature, --top-p, " in output


def test_the_model_says_how_to_sample(engine: FakeEngine) -> None:
    """Its `generation_config.json` does, unless the command says so."""
    why = "sampling: greedy (generation_config.json of the model does not say to sample)\n"
    assert why in ok(*TWO)
    wanted = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1}
    config = {"do_sample": True, "top_k": None, "eos_token_id": 3, **wanted}
    Path("model/generation_config.json").write_text(json.dumps(config))
    output = ok(*TWO, "--samples", "3", "-o", "rows.json", "--write-rows", "--top-k", "5")
    assert engine.sampling == Sampling(max_tokens=1024, seed=1, top_k=5, **wanted)
    text = "temperature 0.6, top-p 0.95, top-k 5, min-p 0.1, repetition penalty 1.1, 3 answers per "
    why = f"{text}problem (--top-k; else generation_config.json of the model)\n"
    assert f"sampling: {why}" in output
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert rows[2]["correct"] == "111" * 5 + "000" * 5
    row = load_profile("one.json").evaluation[-2]
    assert (row.n, row.samples, row.top_k, row.min_p, row.repetition_penalty) == (
        N, 3, 5, 0.1, 1.1,
    )  # fmt: skip
    assert row.paired is not None
    assert row.paired.design_effect == 3
    ok(*TWO, "--temperature", "0")
    assert engine.sampling == Sampling(max_tokens=1024, seed=1, temperature=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-k", "5"], "--top-k: greedy decoding samples nothing"),
        (["--samples", "2"], "--samples 2: greedy"),
        (["--temperature", "0", "--min-p", ".1"], "--min-p: greedy decoding samples nothing"),
        (["--temperature", "1", "--min-p", "2"], "--min-p 2.0: "),
        (["--temperature", "1", "--repetition-penalty", "0"], "--repetition-penalty 0.0: "),
        (["--by", "mask", "--memory", "1GiB"], "--memory: has no meaning by mask"),
        (["--by", "mask", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype: has no meaning by mask"),
        (["--batch-size", "2"], "--batch-size: has no meaning by engine"),
        (["-tp", "3"], "must divide the 2 KV heads"),
        (["--max-loss", "0"], "--max-loss 0: must be"),
        (["--max-loss", "100%"], "--max-loss 100%: must be"),
        (["--max-loss", "some"], "--max-loss some: must be"),
    ],
)
def test_what_cannot_be_asked(arguments: list[str], words: str, engine: FakeEngine) -> None:
    result = run(*TWO, *arguments)
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, words)
    assert engine.starts == []


# --- within a budget ---------------------------------------------------------------------------


BUDGET = ("--profile", "one.json", "--sparsity", ".25,.5,.75", "--max-loss", "2%")


def test_each_sparsity_stops_when_it_is_decided(engine: FakeEngine) -> None:
    """Good at .25, hopeless at .5; so .75 and all streaming are left out."""
    engine.solves = lambda sparsity, n: range(0, n, 1 if sparsity < 0.5 else 2)
    result = run(*BUDGET, "--n", "2000", "-o", "rows.json", "-o", "rows.csv", "--write-rows")
    assert result.exit_code == 0, result.exception
    assert (
        "a loss of at most 2% needs about 502 problems if 2% of the answers change against the "
        "full cache, 1,725 if 10% do; 2,000 are planned, each sparsity stops as soon as it is "
        "decided\n"
    ) in result.stderr
    looks = [(0, 500), (500, 1000), (1000, 1500), (1500, 2000)]
    assert engine.asked[:4] == [(0, *look) for look in looks]
    assert engine.asked[4:] == [(0.25, 0, 500), (0.25, 500, 1000), (0.5, 0, 500)]
    left_out = "sparsity 0.75: not measured, as sparsity 0.5 is beyond the budget"
    assert f"[4/5] one, {left_out}" in result.stdout
    assert "[5/5] all streaming, sparsity 1: not measured, as" in result.stdout
    assert "  one, sparsity 0.25 after 500 of 2000 problems: " in result.stdout
    lines = result.stdout.splitlines()
    assert lines[-2].startswith(
        "one, a loss of at most 2%: sparsity 0.25 is proven; 0.5 is violated: loses 50.0 points"
    )
    assert lines[-1] == "next: rlkv serve model --profile one.json --max-loss 2%"
    rows = json.loads(Path("rows.json").read_text())["rows"]
    figures = [(row["sparsity"], row["n"], row["verdict"], row["max_loss"]) for row in rows]
    assert figures == [
        (0, 2000, "proven", 0.02),
        (0.25, 1000, "proven", 0.02),
        (0.5, 500, "violated", 0.02),
    ]
    assert rows[1]["loss_at_most"] < 0.02 < rows[2]["loss"]
    with open("rows.csv", newline="") as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == [
            "proven",
            "proven",
            "violated",
        ]
    evaluation = load_profile("one.json").evaluation[-2]
    assert evaluation.paired is not None
    assert (evaluation.n, evaluation.paired.level) == (1000, nominal_levels(SHARES)[1])


def test_an_interrupted_look_loses_no_answer(engine: FakeEngine) -> None:
    engine.solves = lambda sparsity, n: range(n)
    arguments = (*BUDGET, "--n", "800", "-o", "rows.json")
    engine.fails_at, engine.fails_after = 0.25, 200
    result = run(*arguments)
    assert isinstance(result.exception, RlkvError)
    engine.fails_at, engine.asked = None, []
    output = ok(*arguments)
    assert engine.asked[0] == (0.25, 200, 400)
    assert "one, a loss of at most 2%: sparsity 1 is proven\n" in output
    # The levels are the same for every budget: nothing is asked again.
    engine.asked = []
    output = ok(*arguments[:-1], "rows.json", "--max-loss", "5%")
    assert engine.asked == []
    assert "one, a loss of at most 5%: sparsity 1 is proven\n" in output
    result = run("--profile", "one.json", "--n", "800", "-o", "rows.json")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "rows.json", "looks")


def test_too_few_problems_are_told(engine: FakeEngine) -> None:
    engine.solves = lambda sparsity, n: range(n)
    lines = [json.dumps({"prompt": f"{i}?", "answer": "1"}) for i in range(120)]
    Path("few.jsonl").write_text("\n".join(lines))
    arguments = ["eval", "model", *BUDGET, "--task", "few.jsonl", "--write-rows"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "the task has 120 problems, not 1,800: all are asked\n" in result.stderr
    assert "120 problems can prove nothing: 180 are the least, if no answer" in result.stderr
    assert [look for look in engine.asked if look[0] == 0.25] == [(0.25, 0, 120)]
    assert "answers have 160 tokens on average and may have 1,024: to prove" in result.stderr
    assert "no sparsity is proven or measured; 0.25 is undecided: loses 0.0 points" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("next: rlkv refine one.json")


def test_by_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model in transformers, as if two ranks served it, without vLLM."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    save_profile(load_profile(packaged_profiles()["embedded"]), "mine.json")
    arguments = ["eval", "embedded", "--profile", "mine.json", "--by", "mask", "-tp", "2", "--n"]
    arguments += ["6", "--sparsity", ".4", "--max-tokens", "60", "--write-rows", "-o", "rows.json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "all streaming, sparsity 1: 6/6, " in result.stderr
    profile = load_profile("mine.json")
    row = profile.evaluation[-2]
    allocation = allocate(profile.gates, 0.4, 2)
    span = (profile.sink, profile.window)
    assert (row.sparsity, row.allocation) == (0.4, allocation.digest(*span))
    model, tokenizer, _ = load_model("embedded")
    task = get_task("embedded")
    expected = solve(
        model,
        tokenizer,
        task,
        task.problems(6, seed=1),
        sampling=Sampling(max_tokens=60, temperature=0),
        split=HeadSplit(allocation.full, *span),
    )
    stored = json.loads(Path("rows.json").read_text())["rows"][1]
    assert stored["output_lengths"] == list(expected.output_tokens)
    assert stored["correct"] == "".join("01"[right] for right in expected.correct)
    assert row.seconds_per_solved is None


def test_files(engine: FakeEngine) -> None:
    ok(*TWO, "-o", "rows.json", "-o", "rows.csv", "--plot", "plot.svg")
    assert Path("plot.svg").read_text().startswith("<?xml")
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(row["profile"], row["sparsity"]) for row in rows] == STARTS
    assert rows[2]["solved"] == 5
    assert rows[2]["correct"] == "1111100000"
    assert rows[2]["output_lengths"] == list(range(100, 110))
    assert rows[2]["p_full"] == pytest.approx(2 / 32)
    assert rows[-1]["seconds_per_solved"] is None
    with open("rows.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in rows]
    assert table[-1]["seconds_per_solved"] == ""
    assert set(rows[0]) - set(table[0]) == {"split", "correct", "cut", "output_lengths"}


# --- interrupted and continued -------------------------------------------------------------


def test_a_failing_engine_loses_nothing_and_the_run_continues(engine: FakeEngine) -> None:
    arguments = (*TWO, "-o", "rows.json", "--write-rows")
    engine.fails_at = 0.5
    before = Path("one.json").read_bytes()
    result = run(*arguments)
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "one at sparsity 0.5", "out of memory", "--output")
    assert "0.722-1.000" in result.output  # the finished rows are shown
    assert len(json.loads(Path("rows.json").read_text())["rows"]) == 2
    assert Path("one.json").read_bytes() == before

    engine.fails_at, engine.starts = None, []
    output = ok(*arguments)
    assert engine.starts == STARTS[2:]
    assert "[2/6] one, sparsity 0.25: 8 of 10 solved, 104 tokens on average (already" in output
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(row["profile"], row["sparsity"]) for row in rows] == STARTS
    assert rows[2]["p_full"] == pytest.approx(2 / 32)

    engine.starts = []
    ok(*arguments)
    assert engine.starts == []
    ok(*arguments, "--fresh")
    assert engine.starts == STARTS


def test_rows_of_other_profiles_stay_in_the_file(engine: FakeEngine) -> None:
    ok("--profile", "one.json", "--sparsity", ".5", "-o", "rows.json")
    engine.starts = []
    ok("--profile", "two.json", "--sparsity", ".5", "-o", "rows.json")
    assert engine.starts == [("two", 0.5)]
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert {row["profile"] for row in rows} == {"full cache", "one", "two", "all streaming"}
    assert len(rows) == 4


def test_changed_gates_are_measured_again(engine: FakeEngine) -> None:
    arguments = ("--profile", "one.json", "--sparsity", ".5", "-o", "rows.json")
    ok(*arguments)
    save_profile(make_profile(gates=random_gates(4, 2, seed=5)), "one.json")
    engine.starts = []
    ok(*arguments)
    assert engine.starts == [("one", 0.5)]
    assert len(json.loads(Path("rows.json").read_text())["rows"]) == 3


def test_profiles_that_split_alike_are_measured_once(engine: FakeEngine) -> None:
    output = ok("--profile", "a=one.json", "--profile", "b=one.json", "--sparsity", ".5")
    assert engine.starts == [("full cache", 0), ("a", 0.5), ("all streaming", 1)]
    assert "b, sparsity 0.5: 5 of 10 solved, 104 tokens on average (already measured)" in output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "2"], "seed 1 there, 2 here"),
        (["--n", "9"], "n 10 there, 9 here"),
        (["--max-tokens", "7"], "max_tokens 1024 there, 7 here"),
        (["--temperature", "1"], "temperature"),
        (["--task", "chain"], "task"),
        (["--dtype", "bfloat16"], "dtype null there"),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype null there"),
    ],
)
def test_other_settings_are_not_mixed(more: list[str], words: str, engine: FakeEngine) -> None:
    ok(*TWO, "-o", "rows.json")
    engine.starts = []
    before = Path("rows.json").read_bytes()
    result = run(*TWO, "-o", "rows.json", *more)
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "rows.json", words, "--fresh")
    assert engine.starts == []
    assert Path("rows.json").read_bytes() == before
    ok(*TWO, "-o", "rows.json", *more, "--fresh")


def test_a_changed_model_is_other_settings(engine: FakeEngine) -> None:
    ok(*TWO, "-o", "rows.json")
    Path("model/model.safetensors").write_bytes(b"retrained")
    result = run(*TWO, "-o", "rows.json")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "model_version")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "expected an object"),
        ("{}", "no file of `rlkv eval 2`"),
        ('{"format": "rlkv eval 2", "rows": []}', "no file of `rlkv eval 2`"),
        ('{"format": "rlkv eval 3", "settings": {}, "rows": []}', "no file of `rlkv eval 2`"),
        ('{"format": "rlkv eval 2", "settings": {}, "rows": []}', "other settings"),
        ('{"for', "not valid JSON"),
    ],
)
def test_a_foreign_file_is_not_overwritten(content: str, words: str, engine: FakeEngine) -> None:
    Path("rows.json").write_text(content)
    result = run(*TWO, "-o", "rows.json")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "rows.json", words, "--fresh")
    assert Path("rows.json").read_text() == content
    assert engine.starts == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("correct", "11111"),
        ("correct", "1111100002"),
        ("output_lengths", [-1] * N),
        ("cut", "1"),
        ("seconds", -1),
        ("split", 3),
    ],
)
def test_a_damaged_row_is_refused(field: str, value: object, engine: FakeEngine) -> None:
    ok(*TWO, "-o", "rows.json")
    content = json.loads(Path("rows.json").read_text())
    content["rows"][2][field] = value
    Path("rows.json").write_text(json.dumps(content))
    result = run(*TWO, "-o", "rows.json")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "rows.json", "--fresh")


# --- rows in the profile ---------------------------------------------------------------------


def test_rows_are_written_into_the_profiles(engine: FakeEngine) -> None:
    old = load_profile("one.json")
    ok(*TWO, "--write-rows", "--max-tokens", "99", "--seed", "3")
    for name in ("one.json", "two.json"):
        profile = load_profile(name)
        assert profile.evaluation[0] == old.evaluation[0]  # another task
        rows = profile.evaluation[1:]
        assert [row.sparsity for row in rows] == [0, 0.25, 0.5, 1]
        assert [row.accuracy for row in rows] == [1, 0.8, 0.5, 0]
        assert {(row.full_accuracy, row.seed, row.max_tokens) for row in rows} == {(1, 3, 99)}
        assert rows[2].seconds_per_solved == 1
        assert rows[3].seconds_per_solved is None
        assert profile.recommended_sparsity is None
    assert load_profile("one.json").gates == old.gates
    ok(*TWO, "--write-rows", "--max-tokens", "99", "--seed", "3")  # the same measurement
    assert len(load_profile("one.json").evaluation) == 5
    ok(*TWO, "--write-rows", "--max-tokens", "99", "--seed", "4")
    assert len(load_profile("one.json").evaluation) == 9


def test_write_rows_refuses_what_is_not_the_users(engine: FakeEngine) -> None:
    for name in ("embedded", str(packaged_profiles()["embedded"])):
        arguments = ["eval", "embedded", "--profile", name, "--write-rows", "--n", "2"]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, RlkvError)
        assert_one_line(result.exception, "--write-rows", "cp ", "my_profile.json")
    assert engine.starts == []


def test_rows_of_another_window_or_of_more_ranks_do_not_recommend(engine: FakeEngine) -> None:
    engine.solves = lambda sparsity, n: range(n)
    arguments = ("--profile", "one.json", "--sparsity", ".5", "--n", "400", "--write-rows")
    before = load_profile("one.json")
    digests = set()
    for more in ((), ("--window", "8"), ("-tp", "2")):
        save_profile(before, "one.json")
        ok(*arguments, *more)
        profile = load_profile("one.json")
        digests.add(profile.evaluation[-2].allocation)
        assert (profile.recommended_sparsity == 1) is not more
        assert engine.options is not None
    ranks = allocate(before.gates, 0.5, 2).digest(before.sink, before.window)
    assert ranks == profile.evaluation[-2].allocation
    assert len(digests) == 3


def test_write_rows_refuses_a_profile_from_the_hub(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkv_vllm.profile import hub

    monkeypatch.setattr(hub, "download", lambda *_, **__: (Path("one.json").resolve(), "abc"))
    monkeypatch.setattr(hub, "download_optional", lambda *_, **__: None)
    result = run("--profile", "some/repo", "--write-rows")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "some/repo", "cp ")
    assert engine.starts == []
    ok("--profile", "some/repo")


def test_gates_that_change_meanwhile_get_no_rows(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = make_profile(gates=random_gates(4, 2, seed=9))

    def opened(*arguments: Any, **options: Any) -> Any:
        save_profile(new, "two.json")
        return engine(*arguments, **options)

    monkeypatch.setattr(served, "opened", opened)
    before = Path("one.json").read_bytes()
    result = run(*TWO, "--write-rows")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "two.json", "changed")
    assert Path("one.json").read_bytes() == before
    assert load_profile("two.json") == new


# --- refused before any engine starts ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "0,half"], "--sparsity '0,half'"),
        (["--sparsity", ""], "--sparsity ''"),
        (["--sparsity", ".2,,.4"], "--sparsity"),
        (["--sparsity", "1.5"], "1.5"),
        (["--sparsity", "nan"], "nan"),
        (["--memory", "much"], "--memory much"),
        (["--top-p", "0"], "--top-p 0"),
        (["--task", "sudoku"], "sudoku"),
        (["--profile", "nowhere.json"], "nowhere.json"),
        (["--profile", "two.json", "--profile", "two.json"], "all are called two"),
        (["--profile", "other.json"], "num_layers is 5 in the profile"),
        (["--plot", "plot.gif"], "plot.gif"),
        (["--plot", "nowhere/plot.png"], "no folder nowhere"),
        (["--output", "rows.txt"], "rows.txt: must end in .json or .csv"),
        (["--output", "rows"], "must end in"),
        (["--output", "nowhere/rows.json"], "no folder nowhere"),
        (["--output", "folder"], "is a folder"),
        (["--output", "/proc/rows.json"], "--output /proc/rows.json: cannot be written"),
        (["--plot", "/proc/plot.png"], "--plot /proc/plot.png: cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], words: str, engine: FakeEngine) -> None:
    result = run("--profile", "one.json", *arguments)
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, words)
    assert engine.starts == []


def test_a_model_needs_a_profile(engine: FakeEngine) -> None:
    result = run()
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "--profile", "rlkv score")
    result = CliRunner().invoke(app, ["eval", "no/such/folder/at/all", "--profile", "one.json"])
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "no/such/folder/at/all")


def test_quick_gives_smaller_defaults_and_says_so(engine: FakeEngine) -> None:
    result = CliRunner().invoke(app, ["eval", "--quick", "--n", "5"])
    assert result.exit_code == 0, result.exception
    assert engine.starts == [("full cache", 0), ("embedded", 0.4), ("all streaming", 1)]
    assert len(engine.problems[0]) == 5  # the explicit flag wins
    assert "--quick: --sparsity .4 instead of 0,.2,.4,.5,.6,.8\n" in result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "next: rlkv eval embedded --profile embedded --max-loss 2%"


def test_ends_with_the_next_command(engine: FakeEngine) -> None:
    save_profile(make_profile(evaluation=[]), "one.json")
    engine.solves = lambda sparsity, n: range(0, n, 1 if sparsity < 0.5 else 2)
    more = ["--profile", "my=one.json", "--sparsity", "0.25"]
    last = ok(*more).splitlines()[-1]  # ten problems say too little
    assert last == "next: rlkv eval model --profile one.json --max-loss 2%"
    engine.solves = lambda sparsity, n: range(0, n, 2 if sparsity else 1)
    last = ok(*more, "--n", "200").splitlines()[-1]
    assert last.startswith("next: rlkv refine one.json --model model"), "violated"
    engine.solves = lambda sparsity, n: range(0, n, 1 if sparsity < 0.5 else 2)
    last = ok(*more, "--n", "200").splitlines()[-1]
    assert last == "next: rlkv bench model --profile one.json --sparsity 0.25"


def test_the_embedded_model_has_its_own_profile(engine: FakeEngine) -> None:
    result = CliRunner().invoke(app, ["eval", "--n", "4", "--sparsity", ".4"])
    assert result.exit_code == 0, result.exception
    assert engine.starts == [("full cache", 0), ("embedded", 0.4), ("all streaming", 1)]
