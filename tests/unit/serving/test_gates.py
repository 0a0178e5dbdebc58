"""Routes of gated mode, on an engine that only keeps its gates."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

pytest.importorskip("vllm")

from rlkv_vllm.engine import config as engine_config
from rlkv_vllm.engine.config import GatedConfig
from rlkv_vllm.engine.gated.live import GET_METHOD
from rlkv_vllm.serving.endpoint import RlkvEndpoint
from tests.unit.serving.test_endpoint import flags

ONES = [[1.0] * 2] * 3
PATH = "/v1/rlkv/gates"


class GatedEngine:
    """An engine client with one worker."""

    vllm_config = None

    def __init__(self) -> None:
        self.now: dict[str, Any] = {"version": 0, "gates": ONES, "kv_heads": [[0, 1]] * 3}

    async def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
        if method != GET_METHOD:
            self.now = self.now | {"gates": args[0], "version": args[1]}
        return [copy.deepcopy(self.now)]

    async def pause_generation(self, **options: Any) -> None: ...
    async def resume_generation(self) -> None: ...
    async def update_weight_version(self, version: str) -> None: ...


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    config = GatedConfig(mode="gated", sink=4, window=16)
    monkeypatch.setattr(engine_config, "gated_config", lambda _: config)
    app = FastAPI()
    app.state.args = flags()
    endpoint = RlkvEndpoint()
    endpoint.attach_router(app)
    engine: Any = GatedEngine()
    await endpoint.init_state(engine, app.state, app.state.args)
    return TestClient(app)


def test_gates_are_shown_and_set(server: TestClient) -> None:
    shown = server.get(PATH).json()
    assert shown.pop("example").startswith("A train leaves")
    assert shown == {"models": ["m"], "version": 0, "sink": 4, "window": 16, "gates": ONES}
    assert server.put(PATH, json={"gates": [[0, 1], [0.5, 1], [1, 1]]}).json() == {"version": 1}
    assert server.get(PATH).json()["gates"] == [[0, 1], [0.5, 1], [1, 1]]


@pytest.mark.parametrize("gate", ["0.5", True, None, [1.0], "NaN"])
def test_what_is_no_number_is_refused(server: TestClient, gate: object) -> None:
    gates = [[gate, 1.0], *ONES[1:]]
    rollout = {"prompts": [[1]], "sampling": {"max_tokens": 1}, "gates": gates}
    answers = [
        server.put(PATH, json={"gates": gates}),
        server.post("/v1/rlkv/rollouts", json=rollout),
    ]
    for answer in answers:
        assert answer.status_code == 422  # vLLM's error handler makes 400 of it
        assert "valid number" in answer.text
    assert server.get(PATH).json()["version"] == 0


def test_a_number_that_is_no_gate_is_refused(server: TestClient) -> None:
    for number in ("NaN", "-0.1", "1e999"):
        body = json.dumps({"gates": ONES}).replace("1.0", number, 1)
        answer = server.put(PATH, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "must be from 0 to 1" in answer.text


@pytest.mark.parametrize("route", ["/v1/rlkv", "/v1/rlkv/forecast"])
def test_routes_of_a_split_name_the_route_of_gates(server: TestClient, route: str) -> None:
    answer = server.get(route)
    assert answer.status_code == 404
    assert answer.json()["detail"].endswith(f"its gates are at {PATH}")


def test_the_page_knows_the_mode(server: TestClient) -> None:
    assert 'data-mode="gated">' in server.get("/rlkv").text
