from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from rlkv_vllm.engine import config as engine_config
from rlkv_vllm.engine.config import SplitPlan
from rlkv_vllm.engine.launch import check_reports, prove_async
from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import model_dir
from rlkv_vllm.profile.budget import Budget
from rlkv_vllm.profile.evidence import sparsity_within
from rlkv_vllm.serving.endpoint import RlkvEndpoint
from rlkv_vllm.serving.metrics import RlkvStatLogger
from rlkv_vllm.serving.status import ByKind, SplitStatus
from rlkv_vllm.tasks.puzzles import example_question
from tests.support.plans import BLOCKS, LENGTH, make_plan, vllm_config
from tests.support.profiles import assert_one_line, make_profile, measured_row


def answer(plan: SplitPlan, rank: int = 0, **changes: Any) -> dict[str, Any]:
    found = {"active": True, "rank": rank, "unsplit_layers": [], "full_head_caches": 4}
    report = asdict(SplitReport.of(plan, rank, BLOCKS))
    return found | {"streaming_head_caches": 4} | report | changes


def refusal(plan: SplitPlan, *answers: dict[str, Any]) -> RlkvError:
    with pytest.raises(RlkvError) as caught:
        check_reports(answers, plan)
    assert_one_line(caught.value, "the KV cache is not split", "rlkv doctor")
    return caught.value


class Engine:
    """An engine client whose workers answer what a test says."""

    def __init__(
        self,
        *answers: Any,
        error: Exception | None = None,
        stat_loggers: Sequence[object] | None = None,
        client_index: int = 0,
    ) -> None:
        self.answers, self.error = answers, error
        self.vllm_config = vllm_config()
        if stat_loggers is None:
            stat_loggers = [RlkvStatLogger(self.vllm_config, [0])]
        self.logger_manager = SimpleNamespace(stat_loggers=stat_loggers)
        self.engine_core = SimpleNamespace(client_index=client_index)

    async def collective_rpc(self, method: str, timeout: float) -> list[Any]:
        assert method == "rlkv_split_report"
        assert timeout > 0
        if self.error:
            raise self.error
        return list(self.answers)


def test_an_answer_that_agrees_is_a_proof() -> None:
    plan = make_plan()
    assert check_reports([answer(plan)], plan) == [SplitReport.of(plan, 0, BLOCKS)]


def test_every_rank_must_answer_once() -> None:
    plan = make_plan(tp_size=2)
    both = [answer(plan, 1), answer(plan, 0)]
    assert len(check_reports(both, plan)) == 2
    assert_one_line(refusal(plan, both[0]), "1 of 2 workers")
    refusal(plan, both[0], both[0])
    refusal(plan)


def test_layers_with_full_caches_are_named() -> None:
    plan = make_plan()
    layers = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
    inactive = {"active": False, "rank": 0, "unsplit_layers": layers}
    inactive |= {"full_head_caches": 0, "streaming_head_caches": 0}
    assert_one_line(refusal(plan, inactive), "worker 0", "2 attention layers", layers[0])


def test_wrong_number_of_head_caches() -> None:
    plan = make_plan()
    assert_one_line(refusal(plan, answer(plan, active=False)), "4 full and 4 streaming")


@pytest.mark.parametrize(
    ("what", "built"),
    [
        ("profile_sha256", "0" * 64),
        ("sparsity", 0.25),
        ("full_heads", 5),
        ("streaming_heads", 3),
        ("sink", 0),
        ("window", 63),
        ("block_size", 32),
    ],
)
def test_another_split_than_planned(what: str, built: object) -> None:
    plan = make_plan()
    assert_one_line(refusal(plan, answer(plan, **{what: built})), f"{what} {built}")


async def test_workers_that_cannot_answer() -> None:
    engine = Engine(error=AttributeError("no attribute\n'rlkv_split_report'"))
    with pytest.raises(RlkvError) as caught:
        await prove_async(engine, make_plan())  # type: ignore[arg-type]
    assert_one_line(caught.value, "not split", "no attribute 'rlkv_split_report'")


async def test_the_question_to_try_is_one_for_the_model_that_is_served(app: FastAPI) -> None:
    app.state.args = flags(model=str(model_dir()), served_model_name=["other"])
    server = await start(app)
    assert server.get("/v1/rlkv").json()["example"] == example_question()


def flags(**changes: Any) -> Namespace:
    plain = {"served_model_name": ["m"], "model": "/m", "api_key": None, "host": None}
    plain |= {"port": 8000, "uds": None, "ssl_keyfile": None, "ssl_certfile": None}
    return Namespace(**(plain | {"root_path": None} | changes))


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An app with the plugin's routes, before the engine is there."""
    monkeypatch.setattr(engine_config, "split_plan", lambda config: make_plan())
    app = FastAPI()
    app.state.args = flags()
    RlkvEndpoint().attach_router(app)
    return app


async def start(app: FastAPI, **engine: Any) -> TestClient:
    plan = make_plan()
    client = Engine(answer(plan), **engine)
    await RlkvEndpoint().init_state(client, app.state, app.state.args)  # type: ignore[arg-type]
    return TestClient(app)


async def test_a_proven_split_is_printed_once_and_exported(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="vllm.rlkv"):
        await start(app, client_index=1)
        assert caplog.text == ""
        await start(app)
    assert "4 full, 4 streaming" in caplog.text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in caplog.text
    assert REGISTRY.get_sample_value("rlkv:active", {"model_name": "m", "engine": "0"}) == 1


async def test_missing_metrics_are_a_refusal(app: FastAPI) -> None:
    with pytest.raises(RlkvError) as caught:
        await start(app, stat_loggers=[])
    assert_one_line(caught.value, "vllm.stat_logger_plugins", "rlkv doctor")


async def test_status_tells_the_plan_and_what_is_held(app: FastAPI) -> None:
    server = await start(app)
    plan = make_plan()
    told = SplitStatus.model_validate(server.get("/v1/rlkv").json())
    assert told.models == ["m"]
    assert told.profile.sha256 == plan.profile.sha256()
    assert (told.heads.full, told.heads.streaming) == (4, 4)
    assert [sum(row) for row in told.head_map.full] == told.heads.full_per_layer
    assert told.head_map.gates == plan.profile.gates
    assert told.capacity.blocks == BLOCKS - 1
    assert told.use is not None
    assert told.use.bytes == ByKind(full=0, streaming=0)


async def test_forecast_has_defaults(app: FastAPI) -> None:
    server = await start(app)
    told = server.get("/v1/rlkv/forecast").json()
    assert (told["tokens"], told["requests"]) == (LENGTH, 1)
    told = server.get("/v1/rlkv/forecast?tokens=100&requests=7").json()
    assert told["split"]["bytes"] == 7 * told["split"]["bytes_per_request"]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("tokens=0", "greater than or equal to 1"),
        ("tokens=-5", "greater than or equal to 1"),
        ("tokens=many", "valid integer"),
        ("tokens=1.5", "valid integer"),
        (f"tokens={LENGTH + 1}", f"longest request is {LENGTH} tokens"),
        ("requests=0", "greater than or equal to 1"),
        ("requests=1000001", "less than or equal to 1000000"),
        ("requests=", "valid integer"),
    ],
)
async def test_forecast_says_what_is_wrong_with_a_query(
    app: FastAPI, query: str, reason: str
) -> None:
    server = await start(app)
    reply = server.get(f"/v1/rlkv/forecast?{query}")
    assert reply.status_code in (400, 422)  # vLLM's error handler makes 400 of FastAPI's 422
    assert reason in reply.text


async def test_without_a_split_the_routes_say_so(app: FastAPI) -> None:
    server = TestClient(app)
    for route in ("/v1/rlkv", "/v1/rlkv/forecast"):
        reply = server.get(route)
        assert reply.status_code == 404
        assert "no split cache" in reply.json()["detail"]
    assert server.get("/rlkv").status_code == 200


def test_routes_are_described(app: FastAPI) -> None:
    described = app.openapi()
    assert {"/v1/rlkv", "/v1/rlkv/forecast"} == set(described["paths"])
    assert {"SplitStatus", "SplitForecast"} <= set(described["components"]["schemas"])


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [(None, None, "open"), (["k"], None, "needed"), (None, "k", "needed"), ([""], None, "open")],
)
def test_the_page_knows_whether_a_key_is_needed(
    app: FastAPI,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str] | None,
    variable: str | None,
    expected: str,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    app.state.args = flags(api_key=given)
    assert f'<body data-key="{expected}" data-mode="split">' in TestClient(app).get("/rlkv").text


async def test_init_state_refuses_when_a_worker_is_not_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan()
    monkeypatch.setattr(engine_config, "split_plan", lambda config: plan)
    state = SimpleNamespace()
    with pytest.raises(RlkvError, match="not split"):
        await RlkvEndpoint().init_state(
            Engine(answer(plan, active=False)),  # type: ignore[arg-type]
            state,  # type: ignore[arg-type]
            flags(),
        )
    assert not hasattr(state, "rlkv")


async def test_nothing_happens_without_a_split_or_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_config, "split_plan", lambda config: None)
    state = SimpleNamespace()
    engine = Engine(error=AssertionError("asked"))
    await RlkvEndpoint().init_state(engine, state, flags())  # type: ignore[arg-type]
    await RlkvEndpoint().init_state(None, state, flags())  # type: ignore[arg-type]
    assert vars(state) == {}


def test_vllm_accepts_the_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(RlkvEndpoint(), EndpointPlugin)
    assert RlkvEndpoint.name == "rlkv"


def test_the_summary_shows_the_fullest_worker(tmp_path: Path) -> None:
    from rlkv_vllm.serving.summary import summary

    report = SplitReport.of(make_plan(), 0, BLOCKS)
    tight = replace(report, requests_at_once=3)
    text = summary([report, tight], flags())
    assert "fullest of 2 workers" in text
    assert ", 3 requests of 512 tokens" in tight.sentence()
    assert ", 1 request of 512 tokens" in replace(report, requests_at_once=1).sentence()
    row = next(line for line in text.splitlines() if "requests at once" in line)
    assert row.split() == f"requests at once of 512 tokens 3 {report.full_requests_at_once}".split()


def test_the_summary_says_why_this_sparsity() -> None:
    from rlkv_vllm.serving.summary import summary

    report = SplitReport.of(make_plan(), 0, BLOCKS)
    assert "budget" not in summary([report], flags())
    profile = make_profile(evaluation=[measured_row(0.5, lost=4)])
    text = summary([report], flags(), sparsity_within(profile, Budget(0.02)))
    line = next(line for line in text.splitlines() if "budget" in line)
    assert line.startswith("  sparsity 0.5: budget 2%, proven: loses 0.4 points, at most ")
    assert line.endswith(", n 1000, task sums")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"host": "0.0.0.0", "port": 81}, "curl http://127.0.0.1:81/v1/"),
        ({"host": "::1"}, "curl http://[::1]:8000/v1/"),
        ({"ssl_keyfile": "k", "ssl_certfile": "c"}, "curl https://127.0.0.1:8000/v1/"),
        ({"uds": "/s"}, "curl --unix-socket /s http://localhost/v1/"),
        ({"root_path": "/llm"}, "curl http://127.0.0.1:8000/llm/v1/"),
        ({"api_key": ["secret"]}, "Authorization: Bearer YOUR_KEY"),
        ({"served_model_name": None}, '"model": "/m"'),
        ({"served_model_name": ["embedded"]}, "A train leaves"),
        ({"model": str(model_dir())}, example_question()),
    ],
)
def test_the_example_request_fits_the_flags(changes: dict[str, Any], expected: str) -> None:
    from rlkv_vllm.serving.summary import summary

    text = summary([SplitReport.of(make_plan(), 0, BLOCKS)], flags(**changes))
    assert expected in text
    assert "secret" not in text
