"""Requests of a server that was told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from rlkv_vllm.serving import drain
from rlkv_vllm.serving.drain import TurnAway, watch_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    drain._stopping.clear()


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(TurnAway)

    @app.post("/work")
    async def work(status: int = 200, stop_meanwhile: bool = False) -> JSONResponse:
        if stop_meanwhile:
            drain._stopping.set()
        return JSONResponse({"status": status}, status)

    @app.get("/health")
    async def health() -> None: ...

    return TestClient(app)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_noticed_and_handed_on(number: signal.Signals) -> None:
    handed_on = []
    signal.signal(number, lambda signum, frame: handed_on.append(signum))
    async with watch_signals(FastAPI()):
        assert not drain._stopping.is_set()
        os.kill(os.getpid(), number)
        assert drain._stopping.is_set()
    assert handed_on == [number]


def test_a_stopping_server_turns_work_away_and_still_tells_how_it_is(client: TestClient) -> None:
    assert client.post("/work").status_code == 200
    drain._stopping.set()
    reply = client.post("/work")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "10"
    assert reply.headers["connection"] == "close"
    assert "stopping" in reply.json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_what_the_engine_refuses_meanwhile_is_turned_away_too(client: TestClient) -> None:
    assert client.post("/work?status=500").status_code == 500  # while it runs, an error is one
    assert client.post("/work?status=400&stop_meanwhile=true").status_code == 400
    drain._stopping.clear()
    assert client.post("/work?status=200&stop_meanwhile=true").json() == {"status": 200}
    drain._stopping.clear()
    reply = client.post("/work?status=500&stop_meanwhile=true")
    assert reply.status_code == 503
    assert "stopping" in reply.json()["error"]["message"]
