from argparse import Namespace

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from rlkv_vllm.serving.guard import guard_routes

OPEN = {"/health", "/rlkv", "/metrics"}
ROUTES = ("/health", "/rlkv", "/metrics", "/v1/models", "/invocations", "/tokenize", "/new_route")


def client(root_path: str = "", **flags: object) -> TestClient:
    app = FastAPI(root_path=root_path)
    app.state.args = Namespace(
        **{"api_key": ["k"], "open_routes": False, "guard_metrics": False} | flags
    )
    for route in ROUTES:
        app.add_api_route(route, lambda: "answer", methods=["GET", "POST", "OPTIONS"])
    guard_routes(app)
    return TestClient(app)


def open_to_all(client: TestClient) -> set[str]:
    statuses = {route: client.post(route).status_code for route in ROUTES}
    assert set(statuses.values()) <= {200, 401}
    return {route for route, status in statuses.items() if status == 200}


def test_every_route_needs_the_key_but_three() -> None:
    assert open_to_all(client()) == OPEN
    for key, status in (("k", 200), ("K", 401), ("", 401)):
        answer = client().post("/new_route", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/Health", "/health/../invocations", "/rlkv/x"]
)
def test_no_other_spelling_is_open(path: str) -> None:
    answer = client().post(path, follow_redirects=False)
    assert answer.status_code == 401


def test_metrics_can_be_guarded() -> None:
    assert open_to_all(client(guard_metrics=True)) == OPEN - {"/metrics"}


@pytest.mark.parametrize("flags", [{"open_routes": True}, {"api_key": None}])
def test_open_routes(flags: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert open_to_all(client(**flags)) == set(ROUTES)


def test_a_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert open_to_all(client(api_key=None)) == OPEN


def test_a_server_of_vllm_serve_keeps_its_behaviour() -> None:
    app = FastAPI()
    app.state.args = Namespace(api_key=["k"])
    guard_routes(app)
    assert not app.user_middleware


def test_preflight_of_cors_needs_no_key() -> None:
    """vLLM adds its middleware for CORS around ours."""
    asked = client()
    asked.app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert asked.options("/new_route", headers=asks).status_code == 200
    assert asked.options("/new_route").status_code == 401


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "TRACE", "ANY"])
def test_a_mounted_app_needs_the_key_for_every_method(method: str) -> None:
    """vLLM mounts /metrics, which answers any method and any longer path."""
    guarded = client(guard_metrics=True)
    guarded.app.mount("/mounted", PlainTextResponse("figures"))
    assert guarded.request(method, "/mounted").status_code == 401
    key = {"Authorization": "Bearer k"}
    assert guarded.request(method, "/mounted", headers=key).status_code == 200


def test_a_websocket_needs_the_key() -> None:
    asked = client()

    @asked.app.websocket("/v1/realtime")
    async def answer(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    with pytest.raises(WebSocketDenialResponse) as refused, asked.websocket_connect("/v1/realtime"):
        pass
    assert refused.value.status_code == 401
    key = {"Authorization": "Bearer k"}
    with asked.websocket_connect("/v1/realtime", headers=key):
        pass


def test_a_root_path_opens_nothing_else() -> None:
    asked = client(root_path="/v1")
    for path, status in (("/v1/health", 200), ("/v1/models", 401), ("/v1/v1/health", 401)):
        assert asked.get(path, follow_redirects=False).status_code == status
