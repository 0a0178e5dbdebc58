"""A server that was told to stop takes no new requests, while those that run may finish.

vLLM's server goes on accepting requests until its engine has drained, and the engine refuses
them: their clients would get status 500, or an answer without tokens.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator
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
_stopping = threading.Event()


@asynccontextmanager
async def watch_signals(app: FastAPI) -> AsyncIterator[None]:
    """Notice SIGTERM and SIGINT, and leave what they do to vLLM.

    A lifespan of the app: it starts after vLLM has set its own handlers. Those are called by the
    event loop whatever handler Python has, and whoever had one before us is called too.
    """
    del app
    _stopping.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            _notice(number)
    yield


def _notice(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def handle(signum: int, frame: FrameType | None) -> Any:
        _stopping.set()
        return before(signum, frame) if callable(before) else None

    signal.signal(number, handle)
    signal.siginterrupt(number, False)  # as asyncio leaves it


class TurnAway:
    """ASGI middleware: 503 with `Retry-After` for what would start work on a stopping server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if _stopping.is_set():
            await _refusal()(scope, receive, send)
            return
        turned_away = False

        async def send_unless_refused(message: Message) -> None:
            # The request came before the signal, and reached the engine after it.
            nonlocal turned_away
            if (
                message["type"] == "http.response.start"
                and message["status"] == HTTPStatus.INTERNAL_SERVER_ERROR
                and _stopping.is_set()
            ):
                turned_away = True
                await _refusal()(scope, receive, send)
            elif not turned_away:
                await send(message)

        await self.app(scope, receive, send_unless_refused)


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
