"""With ``--api-key``, every route needs the key but the few that are named here.

vLLM guards what is under ``/v1`` and leaves other routes open that generate, e.g. ``/invocations``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

#: For load balancers; the page, whose figures need the key; Prometheus, which sends no key.
OPEN_ROUTES = frozenset({"/health", "/rlkv", "/metrics"})


def api_keys(args: Namespace) -> list[str]:
    """Keys that the server accepts: of ``--api-key``, else of ``VLLM_API_KEY``."""
    return [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


def guard_routes(app: FastAPI) -> None:
    """Ask for the key on all routes, unless there is none or ``--open-routes`` is given."""
    args = app.state.args
    # A server that `vllm serve` started has none of our flags, and keeps vLLM's behaviour.
    if getattr(args, "open_routes", True) or not api_keys(args):
        return
    open_routes = OPEN_ROUTES - ({"/metrics"} if args.guard_metrics else set())
    app.add_middleware(RouteGuard, tokens=api_keys(args), open_routes=open_routes)


class RouteGuard(AuthenticationMiddleware):
    """ASGI middleware: answers 401 where the key is missing or wrong.

    Args:
        app: what is guarded.
        tokens: accepted keys.
        open_routes: paths that need none, without the server's ``--root-path``.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[str], open_routes: Collection[str]) -> None:
        super().__init__(app, list(tokens))
        self.open_routes = open_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; preflights of CORS carry no key and are answered before they get here."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        is_open = scope["type"] not in ("http", "websocket") or path in self.open_routes
        if is_open or self.verify_token(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
