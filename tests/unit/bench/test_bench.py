"""Cases, record and report of `rlkv bench`, without an engine."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlkv_vllm import cli
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.bench.case import ALL_FULL, SPLIT, STOCK, TRANSFORMERS, VLLM, Setup
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.capacity import PROMPT, mean_context
from rlkv_vllm.bench.cases.rollouts import RolloutsCase, Writer
from rlkv_vllm.bench.cases.serve import Monitoring
from rlkv_vllm.bench.random_model import parse_shape
from rlkv_vllm.bench.record import Record
from rlkv_vllm.bench.report import figure, markdown, summary
from rlkv_vllm.bench.target import Options, Target, find_target
from rlkv_vllm.engine.launch import split
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.planning.roofline import Device
from tests.support.profiles import assert_one_line

DEVICE = Device("a machine", 1 << 34, 20e9, 100e9)


def options(model: str = "random:4x2x64", **changes: Any) -> Options:
    fields: dict[str, Any] = {
        "model": model,
        "profile": None,
        "sparsity": None,
        "sink": None,
        "window": None,
        "memory_bytes": 64 << 20,
        "max_model_len": None,
        "max_num_seqs": 128,
        "dtype": None,
        "eager": None,
        "threads": 1,
        "full": False,
        "task": "embedded",
        "turn_seconds": 1.0,
        "is_cuda": False,
    }
    return Options(**(fields | changes))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return find_target("model", options(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def setup(target: Target) -> Setup:
    return target.setup


def test_variants_start_with_equal_options(target: Target) -> None:
    specs = target.specs
    assert specs[STOCK].options == specs[SPLIT].options == specs["all-full"].options
    assert specs[STOCK].options["kv_cache_memory_bytes"] == 64 << 20
    assert specs[STOCK].split is None
    assert specs[STOCK].environment()["VLLM_PLUGINS"] == "none"
    assert (specs[SPLIT].split or {})["sparsity"] == 0.5
    assert (specs["all-full"].split or {})["sparsity"] == 0
    assert set(specs) == {STOCK, SPLIT, ALL_FULL, TRANSFORMERS, VLLM}
    assert specs[TRANSFORMERS].options == specs[VLLM].options == specs[STOCK].options
    assert specs[VLLM].split == {"mode": "gated", "sink": 16, "window": 64}


def test_the_split_is_that_of_the_public_api(tmp_path: Path) -> None:
    target = find_target("model", options("embedded"), tmp_path)
    assert target.specs[SPLIT].split == split("embedded")["additional_config"]["rlkv"]
    assert target.specs["all-full"].split == split("embedded", 0)["additional_config"]["rlkv"]


class FakeServer:
    """Answers at 100 tokens per second, at 80 while somebody scrapes; 2 ms of CPU for a page."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.cpu = 0.0
        self.pages: list[str] = []

    def load(self, **_: Any) -> dict[str, float]:
        time.sleep(0.05)
        self.cpu += 0.64
        speed = 80.0 if self.pages else 100.0
        return {"output_throughput": speed, "total_output_tokens": 64}

    def cpu_seconds(self) -> float:
        return self.cpu

    def scrape(
        self, path: str, rate: float, *, stop: threading.Event, limit: float = math.inf
    ) -> int:
        count = 0
        while count < limit and not stop.wait(1 / rate):
            self.pages.append(path)
            self.cpu += 0.002
            count += 1
        return count


@pytest.mark.parametrize(
    ("variant", "page", "read"),
    [
        (STOCK, "/v1/rlkv", "/metrics"),
        (SPLIT, "/v1/rlkv", "/v1/rlkv"),
        (STOCK, "/version", "/version"),
    ],
)
def test_monitoring_compares_a_server_with_itself(variant: str, page: str, read: str) -> None:
    server: Any = FakeServer(variant)
    case = Monitoring()
    load = {"requests": 8, "prompt": 64, "output": 8, "at_once": 4}
    found = case.turn(server, {"path": page, "scrapes": 100} | load, None)
    assert set(server.pages) == {read}
    assert found["scrape_cpu_ms"] == pytest.approx(2)
    assert found["token_cpu_us"] == pytest.approx(10_000)
    assert found["tokens_per_s"] == 100
    assert found["speed"] == 0.8
    assert found["token_cpu"] > 1
    assert {metric.key for metric in case.metrics} == set(found)


class FakeWriter:
    """Answers every prompt with as many tokens as allowed, and keeps what it is asked."""

    def __init__(self, model: str) -> None:
        self.model, self.rollouts = model, self
        self.asked: list[tuple[Any, Sampling, Any]] = []

    def generate(self, prompts: Any, sampling: Sampling, gates: Any) -> list[Answer]:
        self.asked.append((prompts, sampling, gates))
        return [Answer([7] * sampling.max_tokens) for _ in prompts]


def test_both_writers_of_rollouts_are_asked_the_same(target: Target) -> None:
    case = RolloutsCase()
    (point,) = case.points(target.setup, full=False)
    asked = []
    for _ in range(2):
        writer: Any = FakeWriter(target.specs[VLLM].model)
        state = case.prepare(writer, point)
        found = case.turn(writer, point, state)
        case.turn(writer, point, state)
        assert found["mean_tokens"] == point["tokens"] == 64
        assert found["tokens_per_s"] == pytest.approx(32 * 64 / found["seconds"])
        assert {metric.key for metric in case.metrics} < set(found)
        asked.append(writer.asked)
    assert asked[0] == asked[1]
    (_, warm_up, _), (prompts, sampling, gates), (_, _, others) = asked[0]
    assert (warm_up.max_tokens, sampling.max_tokens) == (8, 64)
    assert len(prompts) == 32
    assert prompts[0] == prompts[3] != prompts[4]
    assert [len(row) for row in gates] == [2] * 4
    assert gates != others, "they empty the prefix cache"


def test_rollouts_that_do_not_fit_name_the_flag(setup: Setup) -> None:
    case = RolloutsCase()
    point = case.points(setup, full=True)[-1]
    assert case.too_large(setup, point | {"prompts": 33}) == "--max-num-seqs 132"
    assert case.too_large(setup, point | {"tokens": 9000}) == "--max-model-len 9065"


def test_rollouts_by_transformers_end_at_the_end_token(target: Target) -> None:
    writer = Writer(target.specs[TRANSFORMERS])
    prompts = [[5, 6, 7], [8], [8]]
    gates = [[0.5, 1.0]] * 4
    answers = [
        a.token_ids for a in writer.rollouts.generate(prompts, Sampling(max_tokens=6), gates)
    ]
    assert [len(answer) for answer in answers] == [6] * 3
    end = answers[0][2]
    sampling = Sampling(max_tokens=6, stop_token_ids=(end,))
    ended = writer.rollouts.generate(prompts, sampling, gates)[0].token_ids
    assert ended == answers[0][: answers[0].index(end) + 1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("full", [False, True])
def test_points_fit_or_say_what_they_need(name: str, full: bool, setup: Setup) -> None:
    case = CASES[name]()
    points = case.points(setup, full=full)
    assert points
    keys = {metric.key for metric in case.metrics} | {"attention"}
    for point in points:
        assert set(case.columns) <= set(point)
        assert json.loads(json.dumps(point)) == point  # it is looked up in a file
        reason = case.too_large(setup, point)
        assert reason is None or "--" in reason or "tokenizer" in reason
        expected = case.expected(setup, DEVICE, point)
        assert set(expected) <= keys
        assert all(0.9 < gain < 2.5 for gain in expected.values())


def test_what_does_not_fit_names_the_flag(setup: Setup) -> None:
    # 2 x 4 layers x 2 heads x 64 x 2 bytes = 2 KiB per token: 32,768 tokens in blocks of 128.
    assert setup.blocks(STOCK) == 256
    assert setup.lacks(31, 1000) is None
    assert setup.lacks(32, 1000) == "--memory 64MiB"
    assert setup.lacks(1, setup.max_model_len) == f"--max-model-len {setup.max_model_len + 1}"
    assert setup.lacks(129, 10) == "--max-num-seqs 129"


def test_mean_context_weighs_requests_by_their_length() -> None:
    # One length: ages are even from the prompt's to the whole.
    assert mean_context(1064, 1064) == PROMPT + 500
    assert mean_context(564, 1064) > PROMPT + 375


def test_shapes() -> None:
    shape = parse_shape("random:28x8x128@512")
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.hidden) == (28, 8, 128, 512)
    assert parse_shape("random:4x2x64").hidden == 128
    for bad in ("random:", "random:4x2", "random:0x2x64", "random:4x2x64@"):
        with pytest.raises(RlkvError, match="28x8x128"):
            parse_shape(bad)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RlkvError) as caught:
        find_target("model", options(memory_bytes=1 << 20), tmp_path)
    assert_one_line(caught.value, "--memory 1,048,576", "--max-model-len 8,448")
    with pytest.raises(RlkvError) as caught:
        CliRunner().invoke(cli.app, ["bench", "--cases", "fast"], catch_exceptions=False)
    assert_one_line(caught.value, "--cases fast", "capacity")
    with pytest.raises(RlkvError) as caught:
        CliRunner().invoke(cli.app, ["bench", str(tmp_path)], catch_exceptions=False)
    assert_one_line(caught.value, "--profile")


# ---- record and report


def described(**changes: Any) -> dict[str, Any]:
    values = {
        "model": "random:4x2x64",
        "profile": "random",
        "sparsity": 0.5,
        "full_heads": 4,
        "streaming_heads": 4,
        "sink": 16,
        "window": 64,
        "layers": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "weights_bytes": 1 << 20,
        "memory_bytes": 64 << 20,
        "threads": 1,
        "engine": {"dtype": "bfloat16", "enforce_eager": True},
    }
    return values | changes


def record_at(path: Path, fresh: bool = False, key: str = "model", **changes: Any) -> Record:
    return Record(
        path,
        {key: described(**changes)},
        too_large={"decode": ["batch 64, context 32768 (--memory 4.0GiB)"]},
        command="rlkv bench random:4x2x64",
        fresh=fresh,
    )


def result(case: str, point: dict[str, Any], **samples: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "case": case,
        "target": "model",
        "point": point,
        "samples": samples,
        "expected": {"seconds": 1.6, "running": 1.9, "tokens_per_s": 1.8, "attention": 2.0},
        "alternating": True,
    }


DECODE = {"batch": 8, "steps": 4}
RESULTS = [
    result(
        "capacity",
        {"tokens": 4096, "at_once": {}, "seconds": 1},
        stock=[{"running": 10.0, "tokens_per_s": 100.0, "preemptions": 0.0}] * 3,
        split=[{"running": 19.0, "tokens_per_s": 160.0, "preemptions": 0.0}] * 3,
    ),
    result(
        "decode",
        DECODE | {"context": 128},
        stock=[{"seconds": 0.1}] * 3,
        split=[{"seconds": 0.1}] * 3,
    ),
    result(
        "decode",
        DECODE | {"context": 8192},
        stock=[{"seconds": s} for s in (0.3, 0.29, 0.4)],
        split=[{"seconds": s} for s in (0.2, 0.21, 0.3)],
    ),
]


def test_a_record_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record = record_at(path)
    record.set_device("model", DEVICE)
    for each in RESULTS:
        record.add(dict(each))
    again = record_at(path)
    assert again.device("model") == DEVICE
    assert again.find("decode", "model", DECODE | {"context": 8192}) is not None
    assert again.find("decode", "model", DECODE | {"context": 4096}) is None
    assert again.find("decode", "other", DECODE | {"context": 8192}) is None
    again.add(dict(RESULTS[1]))
    assert len(again.results) == len(RESULTS)  # replaced, not repeated
    assert again.content["commands"] == ["rlkv bench random:4x2x64"]
    with pytest.raises(RlkvError) as caught:
        record_at(path, sparsity=0.8)
    assert_one_line(caught.value, "model.sparsity 0.5 there, 0.8 here", "--fresh")
    assert not record_at(path, fresh=True, sparsity=0.8).results
    # Another model goes into the same report.
    assert set(record_at(path, key="reasoner").content["targets"]) == {"model", "reasoner"}


@pytest.mark.parametrize("key", ["cpu", "versions"])
def test_a_record_of_another_machine_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record_at(path).add(dict(RESULTS[0]))
    stored = json.loads(path.read_text())
    stored["settings"][key] = {"torch": "1"} if key == "versions" else "another"
    path.write_text(json.dumps(stored))
    with pytest.raises(RlkvError) as caught:
        record_at(path)
    assert_one_line(caught.value, f"--output {path}", key)


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for stem, why in {
        tmp_path / "file/report": "file/report.json",
        Path("/proc/r"): "/proc/r.json",
    }.items():
        result = CliRunner().invoke(cli.app, ["bench", "-o", str(stem)])
        assert isinstance(result.exception, RlkvError)
        assert_one_line(result.exception, "--output", why, "cannot be written")
        assert result.output == ""  # before anything starts


def test_quick_measures_little_and_ends_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkv_vllm.bench import run

    asked: dict[str, Any] = {}

    def fake(options: Options, cases: list[str], **others: Any) -> Any:
        asked.update(others, cases=cases, turn_seconds=options.turn_seconds)
        return [others["stem"]], summary({"results": RESULTS})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", fake)
    result = CliRunner().invoke(cli.app, ["bench", "--quick", "--rounds", "2"])
    assert result.exit_code == 0, result.exception
    assert asked["cases"] == ["capacity", "decode"]
    assert (asked["rounds"], asked["turn_seconds"]) == (2, 5.0)
    assert asked["stem"].name.endswith("-quick")
    assert (
        "--quick: --cases capacity,decode instead of all, --seconds 5.0 instead of 10.0"
        in result.stderr
    )
    assert "on embedded, CPU threads: 1 (" in result.stderr
    assert "stock 100" in result.stdout
    assert "split 160" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: rlkv serve embedded"


@pytest.mark.parametrize("content", [{}, {"format": "rlkv bench 1", "settings": {}}])
def test_other_files_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RlkvError) as caught:
        record_at(path)
    assert_one_line(caught.value, "is no file of `rlkv bench 2`", "--fresh")


def test_report(tmp_path: Path) -> None:
    record = record_at(tmp_path / "run.json")
    record.set_device("model", DEVICE)
    for each in RESULTS:
        record.add(dict(each))
    text = markdown(record.content, "run.png")
    assert "**How many more users**: 19.0 requests of up to 4,096 tokens at once instead of" in text
    assert "copies 20.0 GB/s, matrix products 100 GFLOP/s" in text
    # Pairs of one round are compared: 1.5, 1.38, 1.33; the median over the roofline's 1.6.
    assert (
        "| 8 | 8,192 | 300 (290-400) | 210 (200-300) | **1.38** (1.33-1.50) | 1.60 | 86% |" in text
    )
    # Attention alone: 200 ms against 110 ms.
    assert "| 8 | 8,192 | 200.0 | 110.0 | **1.82** | 2.00 | 91% |" in text
    assert "batch 64, context 32768 (--memory 4.0GiB)" in text
    plot = figure(record.content)
    assert plot is not None
    plot.savefig(tmp_path / "run.png")
    assert figure(record_at(tmp_path / "none.json").content) is None
