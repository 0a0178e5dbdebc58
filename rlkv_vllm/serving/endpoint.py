"""vLLM endpoint plugin: proves at start that the KV cache is split, or refuses to serve.

A general plugin that fails to load is only logged by vLLM, and the server would
go on with whole caches. So the workers are asked what they really built.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import one_line
from rlkv_vllm.serving.summary import summary

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from rlkv_vllm.engine.config import SplitPlan

REPORT_METHOD = "rlkv_split_report"
_REPORT_TIMEOUT_S = 60.0

logger = logging.getLogger("vllm.rlkv")


class RlkvEndpoint:
    """Follows ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = "rlkv"
    required_tasks = None
    #: Of this process's server, for :func:`rlkv_vllm.serving.serve.serve` to look at when it ends.
    engine_client: EngineClient | None = None

    def attach_router(self, app: FastAPI) -> None:
        """This plugin has no routes."""

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Prove the split before the server listens; keep the reports on ``state``.

        Raises:
            RlkvError: the cache is not split as configured.
        """
        if engine_client is None:  # vLLM's render server has no engine
            return
        type(self).engine_client = engine_client
        from rlkv_vllm.engine.config import split_plan

        plan = split_plan(engine_client.vllm_config)
        if plan is None:
            return
        state.rlkv_reports = await prove_split(engine_client, plan)
        logger.info("%s", summary(state.rlkv_reports, args))


async def prove_split(engine_client: EngineClient, plan: SplitPlan) -> list[SplitReport]:
    """Ask every worker what it built and compare that with the plan.

    Returns:
        One report per worker.

    Raises:
        RlkvError: a worker cannot answer, keeps whole caches, or built another split.
    """
    try:
        answers = await engine_client.collective_rpc(REPORT_METHOD, timeout=_REPORT_TIMEOUT_S)
    except Exception as error:  # whatever it is, nothing is proven
        raise _not_active(f"no report from the workers: {one_line(error)}") from error
    return check_answers(answers, plan)


def check_answers(answers: Sequence[dict[str, Any]], plan: SplitPlan) -> list[SplitReport]:
    """Compare the workers' answers with the plan; see :func:`prove_split`."""
    tp_size = plan.groups.allocation.tp_size
    if sorted(answer.get("rank", -1) for answer in answers) != list(range(tp_size)):
        raise _not_active(f"{len(answers)} of {tp_size} workers answered")
    reports = []
    for answer in answers:
        worker = f"worker {answer['rank']}"
        if not answer["active"]:
            unsplit = answer["unsplit_layers"]
            why = (
                f"{len(unsplit)} attention layers keep whole caches, e.g. {unsplit[0]}"
                if unsplit
                else f"it has {answer['full_head_caches']} full and "
                f"{answer['streaming_head_caches']} streaming head caches"
            )
            raise _not_active(f"{worker}: {why}")
        report = SplitReport.from_dict(answer)
        for what, expected in _expected(plan).items():
            built = getattr(report, what)
            if built != expected:
                raise _not_active(f"{worker} has {what} {built}, expected {expected}")
        reports.append(report)
    return reports


def _expected(plan: SplitPlan) -> dict[str, Any]:
    allocation, geometry = plan.groups.allocation, plan.geometry
    return {
        "profile_sha256": plan.profile.sha256(),
        "sparsity": plan.sparsity,
        "full_heads": allocation.num_full,
        "streaming_heads": allocation.num_streaming,
        "sink": geometry.sink,
        "window": geometry.window,
        "block_size": geometry.block_size,
    }


def _not_active(why: str) -> RlkvError:
    return RlkvError(
        f"the KV cache is not split, so this server does not start ({why}): run `rlkv doctor`, "
        "and see that nothing removes 'rlkv' from VLLM_PLUGINS"
    )
