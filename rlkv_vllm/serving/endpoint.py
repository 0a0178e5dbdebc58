"""vLLM endpoint plugin: proves at start that the KV cache is split, and shows the split.

vLLM only logs a general plugin that fails to load, and the server would go on with full caches. So
the workers are asked what they built.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.serving.drain import TurnAway, watch_signals
from rlkv_vllm.serving.guard import api_keys, guard_routes
from rlkv_vllm.serving.page import page
from rlkv_vllm.serving.status import (
    CacheFigures,
    Refusal,
    SplitForecast,
    SplitStatus,
    Unauthorized,
    split_status,
)
from rlkv_vllm.serving.summary import example_question, served_names, summary

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from rlkv_vllm.serving.metrics import RlkvStatLogger

#: More requests than any server runs; keeps the figures small enough for a JSON reader.
_MOST_REQUESTS = 1_000_000

#: For /openapi.json.
_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Unauthorized},
    404: {"model": Refusal, "description": "This server has full caches."},
}

logger = logging.getLogger("vllm.rlkv")
router = APIRouter(tags=["rlkv"], lifespan=watch_signals)


@dataclass(frozen=True)
class ServedSplit:
    """A proven split, for the routes; kept on the app's state."""

    figures: CacheFigures
    stat_logger: RlkvStatLogger
    constant: str
    """JSON of the status up to the value of `use`, which is its last field."""


class RlkvEndpoint:
    """Follows ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = "rlkv"
    required_tasks = None
    #: Of this process's server, for :func:`rlkv_vllm.serving.serve.serve` to look at when it ends.
    engine_client: EngineClient | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the page, the JSON routes, the check of the key, and the end of a stopping server."""
        app.include_router(router)
        app.add_middleware(TurnAway)
        guard_routes(app)
        self._app = app

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Prove the split before the server listens, and show it.

        Raises:
            RlkvError: the cache is not split as configured, its metrics are missing, or there are
                no gates in gated mode.
        """
        if engine_client is None:  # vLLM's render server has no engine
            return
        type(self).engine_client = engine_client
        from rlkv_vllm.engine.config import gated_config, split_plan
        from rlkv_vllm.engine.launch import prove_async

        gated = gated_config(engine_client.vllm_config)
        if gated is not None:
            from rlkv_vllm.serving import gates

            await gates.serve_gates(engine_client, gated, state)
            self._app.include_router(gates.router)
            logger.info("gated mode: sink %d, window %d, all gates 1", gated.sink, gated.window)
            return
        plan = split_plan(engine_client.vllm_config)
        if plan is None:
            return
        reports = await prove_async(engine_client, plan)
        figures = CacheFigures(plan, min(report.num_blocks for report in reports))
        stat_logger = _stat_logger(engine_client)
        stat_logger.show_split(figures)
        names = served_names(args)
        status = split_status(figures, names, example_question(args.model))
        constant = status.model_dump_json(exclude={"use"}).removesuffix("}") + ',"use":'
        state.rlkv = ServedSplit(figures, stat_logger, constant)
        if _is_first_api_process(engine_client):
            logger.info("%s", summary(reports, args, plan.within))


@router.get("/rlkv", include_in_schema=False)
async def show_page(request: Request) -> Response:
    """The page; its figures come from the JSON routes."""
    return page(bool(api_keys(request.app.state.args)), _is_gated(request))


@router.get("/v1/rlkv", response_model=SplitStatus, responses=_REFUSALS)
async def show_status(request: Request) -> Response:
    """The split cache of this server: heads, capacity, and what requests hold now."""
    served = _served(request)
    use = served.stat_logger.cache_use()
    # Polled often: FastAPI would validate and dump the constant part each time.
    content = f"{served.constant}{use.model_dump_json() if use else 'null'}}}"
    return Response(content, media_type="application/json")


@router.get("/v1/rlkv/forecast", responses=_REFUSALS | {400: {"model": Refusal}})
async def show_forecast(
    request: Request,
    tokens: Annotated[
        int | None,
        Query(ge=1, description="Length of each request, prompt and answer; default: the longest."),
    ] = None,
    requests: Annotated[
        int, Query(ge=1, le=_MOST_REQUESTS, description="How many requests at once.")
    ] = 1,
) -> SplitForecast:
    """Cache that a number of requests of one length need, split and full."""
    try:
        return _served(request).figures.forecast(tokens, requests)
    except RlkvError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error


def _served(request: Request) -> ServedSplit:
    served: ServedSplit | None = getattr(request.app.state, "rlkv", None)
    if served is None and _is_gated(request):
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            "this server is in gated mode and has full caches: its gates are at /v1/rlkv/gates",
        )
    if served is None:
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            "this server has no split cache: start it with `rlkv serve`, or with an entry 'rlkv' "
            "in --additional-config",
        )
    return served


def _is_gated(request: Request) -> bool:
    return hasattr(request.app.state, "rlkv_rollouts")


def _stat_logger(engine_client: Any) -> RlkvStatLogger:
    from rlkv_vllm.serving.metrics import RlkvStatLogger

    manager = engine_client.logger_manager
    for stat_logger in manager.stat_loggers if manager else ():
        if isinstance(stat_logger, RlkvStatLogger):
            return stat_logger
    raise RlkvError(
        "plugin rlkv of vllm.stat_logger_plugins was not loaded, so the metrics would be missing: "
        "run `rlkv doctor`, and see that nothing removes 'rlkv' from VLLM_PLUGINS"
    )


def _is_first_api_process(engine_client: Any) -> bool:
    return not getattr(engine_client.engine_core, "client_index", 0)
