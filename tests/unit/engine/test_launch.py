"""The one way to make an engine, and who goes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
import vllm.platforms

import rlkv_vllm
from rlkv_vllm import prove, split
from rlkv_vllm.engine import launch
from rlkv_vllm.engine.launch import CPU_WORKER, SCHEDULER, WORKER_EXTENSION, engine_options, start
from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import save_profile
from tests.support.plans import BLOCKS, make_plan
from tests.support.profiles import assert_one_line, make_profile, measured_row

PACKAGE = Path(rlkv_vllm.__file__).parent
CLASSES = {
    "worker_extension_cls": WORKER_EXTENSION,
    "scheduler_cls": SCHEDULER,
    "worker_cls": CPU_WORKER,
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "heads.json"
    save_profile(make_profile(), path)
    return path


class TestSplit:
    """Arguments of `vllm.LLM` from a profile."""

    def test_what_an_engine_is_made_of(self, profile: Path) -> None:
        options = split(str(profile), sparsity=0.5, sink=3, retention_interval=0)
        rlkv = options.pop("additional_config")["rlkv"]
        assert options == CLASSES
        assert rlkv == {
            "profile": str(profile.resolve()),
            "sparsity": 0.5,
            "sink": 3,
            "window": 64,
            "sha256": make_profile().sha256(),
            "retention_interval": 0,
        }

    def test_a_relative_path_is_that_of_the_caller(
        self, profile: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers may have another working directory."""
        monkeypatch.chdir(profile.parent)
        assert split(Path(profile.name), 0.5) == split(profile, 0.5)

    def test_further_entries_stay(self, profile: Path) -> None:
        config = split(profile, 0.5, additional_config={"mine": 1})["additional_config"]
        assert config["mine"] == 1
        assert config.keys() == {"mine", "rlkv"}
        with pytest.raises(RlkvError) as error:
            split(profile, 0.5, additional_config={"rlkv": {}})
        assert_one_line(error.value, "'rlkv'", "remove it")

    @pytest.mark.parametrize("max_loss", [0.01, "1%", "0.01"])
    def test_a_budget_is_left_to_the_engine(self, profile: Path, max_loss: float | str) -> None:
        """It alone knows its ranks: these rows are of two."""
        rows = [measured_row(0.5, lost=0, tp_size=2)]
        save_profile(make_profile(evaluation=rows), profile)
        rlkv = split(profile, max_loss=max_loss)["additional_config"]["rlkv"]
        assert rlkv == {
            "profile": str(profile.resolve()),
            "max_loss": 0.01,
            "sink": 16,
            "window": 64,
            "sha256": make_profile(evaluation=rows).sha256(),
        }
        measured = split(profile, max_loss=max_loss, evidence="measured")
        assert measured["additional_config"]["rlkv"] == rlkv | {"evidence": "measured"}

    def test_a_budget_needs_rows(self, profile: Path) -> None:
        save_profile(make_profile(evaluation=[]), profile)
        with pytest.raises(RlkvError) as error:
            split(profile, max_loss=0.01)
        assert_one_line(error.value, "no evaluation rows", "`rlkv eval ", "--write-rows`")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"profile": "nowhere.json"}, "nowhere.json"),
            ({"max_loss": 0.01}, "--max-loss 1% chooses the sparsity"),
            ({"sparsity": None, "max_loss": 1}, "did you mean 1%?"),
            ({"sparsity": None, "max_loss": 0}, "--max-loss 0"),
            ({"sparsity": None, "max_loss": float("nan")}, "--max-loss nan"),
            ({"sparsity": None, "max_loss": "little"}, "--max-loss little"),
            ({"sparsity": None, "max_loss": 0.01, "evidence": "guess"}, "--evidence guess"),
            ({"evidence": "measured"}, "--evidence measured"),
            ({"sparsity": 1.5}, "sparsity 1.5"),
            ({"sink": -1}, "sink -1"),
            ({"window": 0}, "window 0"),
            ({"retention_interval": -1}, "retention_interval"),
        ],
    )
    def test_errors_are_one_line(self, options: dict[str, Any], words: str, profile: Path) -> None:
        with pytest.raises(RlkvError) as error:
            split(**({"profile": str(profile), "sparsity": 0.5} | options))
        assert_one_line(error.value, words)

    def test_on_a_gpu_the_worker_is_vllms(
        self, profile: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu = SimpleNamespace(is_cpu=lambda: False)
        monkeypatch.setattr(vllm.platforms, "_current_platform", gpu)
        assert "worker_cls" not in split(profile, 0.5)
        gated = engine_options({"mode": "gated"})
        assert gated.keys() == {"additional_config", "worker_extension_cls", "logprobs_mode"}


def test_gated_mode_has_vllms_scheduler_and_the_logprobs_of_sampling() -> None:
    options = engine_options({"mode": "gated", "sink": 1}, {"mine": 1})
    assert options == {
        "additional_config": {"mine": 1, "rlkv": {"mode": "gated", "sink": 1}},
        "worker_extension_cls": WORKER_EXTENSION,
        "worker_cls": CPU_WORKER,
        "logprobs_mode": "processed_logprobs",
        "block_size": 32,
    }


class FakeLLM:
    """Records its arguments; its workers answer what a test says."""

    made: list[FakeLLM]
    answer: Any = None

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.is_down = {"model": model} | options, False
        config = SimpleNamespace(additional_config=options.get("additional_config", {}))
        core = SimpleNamespace(shutdown=self._shut_down)
        self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=core)
        self.made.append(self)

    def _shut_down(self) -> None:
        self.is_down = True

    def collective_rpc(self, method: str, timeout: float | None = None) -> list[Any]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLLM]]:
    """The engines that are made meanwhile, all by a fake `vllm.LLM`."""
    FakeLLM.made = []
    monkeypatch.setattr(vllm, "LLM", FakeLLM)
    plan = make_plan()
    report = asdict(SplitReport.of(plan, 0, BLOCKS))
    monkeypatch.setattr(FakeLLM, "answer", {"active": True, "rank": 0} | report)
    monkeypatch.setattr(
        launch, "split_plan", lambda config: plan if "rlkv" in config.additional_config else None
    )
    return FakeLLM.made


class TestProve:
    """An engine is split when every worker says so."""

    def test_a_split_engine(self, engines: list[FakeLLM]) -> None:
        llm: Any = FakeLLM("m", additional_config={"rlkv": {}})
        assert prove(llm) == [SplitReport.of(make_plan(), 0, BLOCKS)]

    @pytest.mark.parametrize(
        ("config", "answer", "words"),
        [
            ({}, None, "no entry 'rlkv'"),
            ({"rlkv": {}}, NotImplementedError("rlkv_split_report"), "no report from the workers"),
            ({"rlkv": {}}, TimeoutError(), "TimeoutError"),
            (
                {"rlkv": {}},
                {"active": False, "rank": 0, "unsplit_layers": ["model.layers.0"]},
                "1 attention layers keep full caches, e.g. model.layers.0",
            ),
        ],
    )
    def test_an_engine_with_full_caches(
        self,
        config: dict[str, Any],
        answer: Any,
        words: str,
        engines: list[FakeLLM],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(FakeLLM, "answer", answer)
        llm: Any = FakeLLM("m", additional_config=config)
        with pytest.raises(RlkvError) as error:
            prove(llm)
        assert_one_line(error.value, "not split", words, "rlkv doctor")


class TestStart:
    """An engine that is proven, or none."""

    def test_the_users_options_win(self, engines: list[FakeLLM]) -> None:
        start("m", {"profile": "p"}, seed=3, worker_cls="mine")
        (llm,) = engines
        assert llm.options == CLASSES | {
            "model": "m",
            "additional_config": {"rlkv": {"profile": "p"}},
            "seed": 3,
            "worker_cls": "mine",
        }

    def test_stock_vllm_is_left_alone(self, engines: list[FakeLLM]) -> None:
        start("m", None, seed=3)
        assert engines[0].options == {"model": "m", "seed": 3}

    @pytest.mark.parametrize("config", [{"profile": "p"}, {"mode": "gated"}])
    def test_what_is_not_proven_is_shut_down(
        self, config: dict[str, Any], engines: list[FakeLLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = {"active": False, "rank": 0, "unsplit_layers": ["a"], "version": 0, "gates": []}
        monkeypatch.setattr(FakeLLM, "answer", full)
        with pytest.raises(RlkvError, match=r"not split|has no gates"):
            start("m", config)
        assert engines[0].is_down


class TestEveryCommandMakesTheSameEngine:
    """`rlkv serve`, `rlkv eval`, `rlkv bench` and the API: scheduler, worker and extension."""

    def test_serve(self, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

        from rlkv_vllm.serving.arguments import add_split, parse

        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        options = split(profile, 0.5)
        args = parse(["m", "--profile", str(profile), "--sparsity", "0.5"])
        add_split(args, options["additional_config"]["rlkv"])
        served, made = AsyncEngineArgs.from_cli_args(args), EngineArgs("m", **options)
        for name in (*CLASSES, "additional_config", "attention_backend", "block_size"):
            assert getattr(served, name) == getattr(made, name), name

    def test_evaluate(self, profile: Path, engines: list[FakeLLM]) -> None:
        from rlkv_vllm.evaluation import served
        from rlkv_vllm.evaluation.splits import Split
        from rlkv_vllm.profile.choice import choose_profile

        row = Split("p", choose_profile(str(profile), 0.5), tp_size=2)
        nothing: Any = None
        with (
            pytest.raises(AttributeError),  # the fake one cannot chat
            served.opened("m", row, nothing, [], nothing),
        ):
            pass
        assert engines[0].options.items() >= CLASSES.items()
        assert engines[0].options["tensor_parallel_size"] == 2
        assert engines[0].options["additional_config"] == {"rlkv": row.choice.engine_config()}

    def test_bench(self) -> None:
        assert "start" in set().union(*map(_from_launch, (PACKAGE / "bench").rglob("*.py")))

    def test_nobody_else_makes_engines(self) -> None:
        """Neither vLLM's classes nor the names of ours are in any other module."""
        names = {path.rpartition(".")[2] for path in CLASSES.values()}
        for path in PACKAGE.rglob("*.py"):
            if path == PACKAGE / "engine" / "launch.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = node.func
                    name = getattr(called, "id", getattr(called, "attr", ""))
                    assert name not in ("LLM", "AsyncLLM", "from_engine_args"), path
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                    assert not (text.startswith("rlkv_vllm.") and text.endswith(tuple(names))), path


def _from_launch(path: Path) -> set[str]:
    """What a module takes from `rlkv_vllm.engine.launch`."""
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == launch.__name__
        for alias in node.names
    }
