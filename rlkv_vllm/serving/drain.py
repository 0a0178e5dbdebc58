"""A server that was told to stop takes no new requests, and ends when its time is over.

vLLM's server goes on accepting requests until its engine has drained, and the engine refuses
them: their clients would get status 500, or an answer without tokens. And where a request needs
longer than `--shutdown-timeout`, vLLM stops the engine and then waits for the answer for ever.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from rlkv_vllm.serving.arguments import SHUTDOWN_TIMEOUT_S

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {"Retry-After": str(SHUTDOWN_TIMEOUT_S), "Connection": "close"}
#: After the time that vLLM gives its engine.
_CUT_AFTER_S = 1.0

_stopping = threading.Event()
_engine_died = threading.Event()
_running: set[asyncio.Task[Any]] = set()


@asynccontextmanager
async def watch_signals(app: FastAPI) -> AsyncIterator[None]:
    """Notice SIGTERM and SIGINT, and leave what they do to vLLM.

    A lifespan of the app: it starts after vLLM has set its own handlers. Those are called by the
    event loop whatever handler Python has, and whoever had one before us is called too.
    """
    _stopping.clear()
    _engine_died.clear()
    args = getattr(app.state, "args", None)
    seconds = getattr(args, "shutdown_timeout", SHUTDOWN_TIMEOUT_S) + _CUT_AFTER_S
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not _stopping.is_set():
            _stopping.set()
            loop.call_soon_threadsafe(loop.call_later, seconds, _cut)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            _notice(number, stop)
    yield
    # Nothing has been taken down yet: an engine that fails now was not told to end.
    engine = getattr(app.state, "engine_client", None)
    if not _stopping.is_set() and getattr(engine, "errored", False):
        _engine_died.set()


def engine_died() -> bool:
    """Whether this process's server ended because its engine failed."""
    return _engine_died.is_set()


def _notice(number: signal.Signals, stop: Callable[[], None]) -> None:
    before = signal.getsignal(number)

    def handle(signum: int, frame: FrameType | None) -> Any:
        stop()
        return before(signum, frame) if callable(before) else None

    signal.signal(number, handle)
    signal.siginterrupt(number, False)  # as asyncio leaves it


def _cut() -> None:
    for task in _running:
        task.cancel()


class TurnAway:
    """ASGI middleware: 503 with `Retry-After` for what a stopping server does not answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; the server has a task for each."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if _stopping.is_set():
            await _refusal()(scope, receive, send)
            return
        has_begun = is_refused = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_begun, is_refused
            # The request came before the signal, and reached the engine after it.
            if message.get("status") == HTTPStatus.INTERNAL_SERVER_ERROR and _stopping.is_set():
                has_begun = is_refused = True
                await _refusal()(scope, receive, send)
            elif not is_refused:
                has_begun = True
                await send(message)

        task = asyncio.current_task()
        assert task is not None
        _running.add(task)
        try:
            await self.app(scope, receive, send_unless_refused)
        except (asyncio.CancelledError, Exception):  # parts of the server are gone already
            if not _stopping.is_set():
                raise
            # A stream that has begun ends without its last part: the connection is closed.
            if not has_begun:
                await _refusal()(scope, receive, send)
        finally:
            _running.discard(task)


def _refusal() -> JSONResponse:
    """In the form of vLLM's own errors."""
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = {
        "message": "this server is stopping and takes no new requests: ask again later",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": status.value,
    }
    return JSONResponse({"error": error}, status, _HEADERS)
