"""vLLM endpoint plugin: proves at start that the KV cache is split, or refuses to serve.

A general plugin that fails to load is only logged by vLLM, and the server would
go on with whole caches. So the workers are asked what they really built.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import one_line

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from rlkv_vllm.engine.config import SplitPlan

REPORT_METHOD = "rlkv_split_report"
_REPORT_TIMEOUT_S = 60.0


class RlkvEndpoint:
    """Follows ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = "rlkv"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """No routes yet."""

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Prove the split before the server listens; keep the report on ``state``.

        Raises:
            RlkvError: the cache is not split as configured.
        """
        if engine_client is None:  # vLLM's render server has no engine
            return
        from rlkv_vllm.engine.config import split_plan

        plan = split_plan(engine_client.vllm_config)
        if plan is None:
            return
        reports = await prove_split(engine_client, plan)
        state.rlkv_reports = reports
