"""Requests of a server that was told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from rlkv_vllm.serving import drain
from rlkv_vllm.serving.drain import TurnAway, watch_signals

POST = {"type": "http", "method": "POST"}
#: What the event loop was told of.
handled: list[signal.Signals] = []


@pytest.fixture(autouse=True)
def nobody_is_stopping() -> Iterator[None]:
    yield
    drain._stopping.clear()


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(TurnAway)

    @app.post("/work")
    async def work(status: int = 200, stop_meanwhile: bool = False) -> JSONResponse:
        if stop_meanwhile:
            drain._stopping.set()
        if status == 599:
            raise RuntimeError("cannot schedule new futures after shutdown")
        return JSONResponse({"status": status}, status)

    @app.get("/health")
    async def health() -> None: ...

    return TestClient(app)


async def never_end(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(60)


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
async def number(request: pytest.FixtureRequest) -> AsyncIterator[signal.Signals]:
    """A signal that the event loop handles, as vLLM has it."""
    number: signal.Signals = request.param
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, handled.append, number)
    yield number
    loop.remove_signal_handler(number)
    handled.clear()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_signal_is_noticed_and_handed_on(number: signal.Signals) -> None:
    async with watch_signals(FastAPI()):
        assert not drain._stopping.is_set()
        os.kill(os.getpid(), number)
        await until(lambda: bool(handled))
        assert drain._stopping.is_set()
    os.kill(os.getpid(), number)  # the loop has its signals back
    await until(lambda: handled == [number, number])


async def test_requests_of_before_have_time_to_reach_the_engine(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones are turned away meanwhile; a second signal ends the wait."""
    monkeypatch.setattr(drain, "_ARRIVE_S", 10)
    async with watch_signals(FastAPI()):
        running = asyncio.create_task(TurnAway(never_end)(POST, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        os.kill(os.getpid(), number)
        await until(drain._stopping.is_set)
        assert not handled
        os.kill(os.getpid(), number)
        await until(lambda: handled == [number])
        running.cancel()


async def test_other_signals_are_handled_as_ever() -> None:
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, seen.set)
    async with watch_signals(FastAPI()):
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(seen.wait(), 60)
        assert not drain._stopping.is_set()
    loop.remove_signal_handler(signal.SIGUSR1)


@pytest.mark.parametrize(("errored", "stopping"), [(True, False), (True, True), (False, False)])
async def test_an_engine_that_failed_by_itself_is_told_from_one_that_was_stopped(
    errored: bool, stopping: bool
) -> None:
    app = FastAPI()
    app.state.engine_client = Namespace(errored=errored)
    async with watch_signals(app):
        if stopping:
            drain._stopping.set()
    assert drain.engine_died() == (errored and not stopping)


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
    with pytest.raises(RuntimeError, match="futures"):
        client.post("/work?status=599")
    for status in (500, 599):
        reply = client.post(f"/work?status={status}&stop_meanwhile=true")
        assert reply.status_code == 503
        assert "stopping" in reply.json()["error"]["message"]
        drain._stopping.clear()


def test_a_signal_before_the_request_is_not_forgotten(client: TestClient) -> None:
    drain._stopping.set()
    reply = client.post("/work?status=500")
    assert reply.status_code == 503
    assert "stopping" in reply.json()["error"]["message"]


@pytest.mark.parametrize("has_begun", [False, True])
async def test_what_never_ends_is_cut(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    """VLLM's engine is gone by then, and nobody would ever finish the answer."""
    monkeypatch.setattr(drain, "_CUT_AFTER_S", 0.05)
    started, sent = asyncio.Event(), []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        started.set()
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    app = FastAPI()
    app.state.args = Namespace(shutdown_timeout=0)
    async with watch_signals(app):
        request = asyncio.create_task(TurnAway(endless)(POST, receive, send))  # type: ignore[arg-type]
        await started.wait()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(request, 60)
    assert [message["status"] for message in sent if "status" in message] == (
        [200] if has_begun else [503]
    )
    assert len(sent) == (1 if has_begun else 2)


async def test_a_request_that_is_cancelled_otherwise_is_left_alone() -> None:
    request = asyncio.create_task(TurnAway(never_end)(POST, None, None))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
