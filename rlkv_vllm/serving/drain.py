"""A server that was told to stop refuses new requests, and ends after `--shutdown-timeout`.

vLLM's server goes on accepting requests until its engine has drained. The engine refuses them, so
clients would get status 500 or an answer without tokens. And where a request needs longer than
`--shutdown-timeout`, vLLM stops the engine and then waits for the answer for ever.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from rlkv_vllm.serving.arguments import SHUTDOWN_TIMEOUT_S
from rlkv_vllm.serving.supervise import tell_supervisor

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {"Retry-After": str(SHUTDOWN_TIMEOUT_S), "Connection": "close"}
#: Requests that arrived before the signal get to the engine within this time.
_ARRIVE_S = 2.0
#: Requests are cancelled this long after vLLM's own timeout.
_CUT_AFTER_S = 1.0

_stopping = threading.Event()
_engine_died = threading.Event()
_running: set[asyncio.Task[Any]] = set()


@asynccontextmanager
async def watch_signals(app: FastAPI) -> AsyncIterator[None]:
    """From SIGTERM or SIGINT on, refuse requests; vLLM gets the signal later and ends the server.

    A lifespan of the app: it starts after vLLM has set its handlers, in the event loop.
    """
    _stopping.clear()
    _engine_died.clear()
    args = getattr(app.state, "args", None)
    timeout = getattr(args, "shutdown_timeout", SHUTDOWN_TIMEOUT_S)
    in_main_thread = threading.current_thread() is threading.main_thread()
    with _signals_first(asyncio.get_running_loop(), timeout) if in_main_thread else nullcontext():
        tell_supervisor()
        yield
    # Nothing has been shut down yet: an engine that fails now was not told to end.
    engine = getattr(app.state, "engine_client", None)
    if not _stopping.is_set() and getattr(engine, "errored", False):
        _engine_died.set()


def engine_died() -> bool:
    """Whether this process's server ended because its engine failed."""
    return _engine_died.is_set()


@contextmanager
def _signals_first(loop: asyncio.AbstractEventLoop, timeout: float) -> Iterator[None]:
    """Get signals before `loop` calls its handlers.

    Python writes the number of every signal to a file descriptor, which the loop reads. `timeout`
    is the time that vLLM then gives its engine (seconds).
    """
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    loops_own = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    waiting: list[asyncio.TimerHandle] = []

    def forward(numbers: bytes) -> None:
        if loops_own >= 0:
            os.write(loops_own, numbers)

    def notice() -> None:
        numbers = receiver.recv(4096)
        if _stopping.is_set() or not {signal.SIGTERM, signal.SIGINT}.intersection(numbers):
            forward(numbers)  # a second Ctrl-C does not wait
            return
        _stopping.set()
        delay = min(_ARRIVE_S, timeout) if _running else 0
        waiting.append(loop.call_later(delay, forward, numbers))
        waiting.append(loop.call_later(delay + timeout + _CUT_AFTER_S, _cut))

    loop.add_reader(receiver, notice)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        loop.remove_reader(receiver)
        signal.set_wakeup_fd(loops_own, warn_on_full_buffer=False)
        receiver.close()
        sender.close()


def _cut() -> None:
    for task in _running:
        task.cancel()


class TurnAway:
    """ASGI middleware: a stopping server refuses requests with 503 and `Retry-After`."""

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
            # It arrived before the signal, and got to the engine after it.
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
        except (asyncio.CancelledError, Exception):  # parts of the server may be gone
            if not _stopping.is_set():
                raise
            # A stream that has begun ends without its last part, and the connection closes.
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
