"""Routes of a server in gated mode: read and set the gates, sample rollouts.

They exist in this mode only. They are under ``/v1``, so that ``--api-key`` protects them.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from rlkv_vllm.answers import Sampling
from rlkv_vllm.engine.gated.live import (
    GET_METHOD,
    GatesUpdater,
    LiveGates,
    rolled_out,
    sampling_params,
)
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.serving.status import Refusal, Unauthorized, Unreadable
from rlkv_vllm.serving.summary import example_question, served_names

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from rlkv_vllm.engine.config import GatedConfig

#: For /openapi.json.
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal | Unreadable},
    401: {"model": Unauthorized},
}

router = APIRouter(tags=["rlkv"])

#: [layers][KV heads]; a text or a boolean is no gate.
Gates = list[list[Annotated[float, Field(strict=True)]]]


class NewGates(BaseModel):
    """Gates to set."""

    model_config = ConfigDict(extra="forbid")

    gates: Gates = Field(description="[layers][KV heads], from 0 to 1.")


class GatesVersion(BaseModel):
    """Version of the gates that have been set."""

    version: int


class ServedGates(BaseModel):
    """The gates of this server."""

    models: list[str] = Field(description="Names under which the model is served.")
    version: int = Field(description="Number of times they were set; at 0 all are 1.")
    sink: int
    window: int
    gates: list[list[float]] = Field(description="[layers][KV heads].")
    example: str = Field(description="A question to try.")


class RolloutRequest(BaseModel):
    """Prompts, each of which is answered once."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[Annotated[list[int], Field(min_length=1)]] = Field(
        min_length=1, description="Token ids."
    )
    sampling: Sampling
    gates: Gates | None = Field(
        default=None, description="Gates to set before sampling; null: the current ones."
    )


class RolledOut(BaseModel):
    """An answer, the stop token included."""

    token_ids: list[int]
    logprobs: list[float] = Field(description="Of every token, after temperature and filters.")
    gates_version: int = Field(description="Version of the gates that it was sampled with.")


class RolloutAnswer(BaseModel):
    """Answers in the order of the prompts."""

    answers: list[RolledOut]


class Rollouts:
    """The engine and its gates, for the routes; kept on the app's state."""

    def __init__(self, engine_client: EngineClient, config: GatedConfig, now: LiveGates) -> None:
        self.engine = engine_client
        self.config = config
        self.updater = GatesUpdater(engine_client, now)

    async def answer(self, prompt: list[int], sampling: Sampling, index: int) -> RolledOut:
        """Answer one prompt; `index` makes its seed differ from the others."""
        request_id = f"rollout-{uuid.uuid4()}"
        given: Any = {"prompt_token_ids": prompt}
        # One output: the finished answer.
        outputs = self.engine.generate(given, sampling_params(sampling, index), request_id)
        finished = [output async for output in outputs][-1]
        return RolledOut(**rolled_out(finished.outputs[0]))


async def serve_gates(engine_client: EngineClient, config: GatedConfig, state: State) -> None:
    """Prove that the engine has gates, and keep it for the routes.

    Raises:
        RlkvError: a worker has none.
    """
    now = LiveGates.of(await engine_client.collective_rpc(GET_METHOD))
    state.rlkv_rollouts = Rollouts(engine_client, config, now)


@router.get("/v1/rlkv/gates", responses={401: _REFUSALS[401]})
async def show_gates(request: Request) -> ServedGates:
    """The current gates."""
    state = request.app.state
    now, config = state.rlkv_rollouts.updater.now, state.rlkv_rollouts.config
    return ServedGates(
        models=served_names(state.args),
        version=now.version,
        sink=config.sink,
        window=config.window,
        gates=now.gates,
        example=example_question(state.args.model),
    )


@router.put("/v1/rlkv/gates", responses=_REFUSALS)
async def set_gates(request: Request, body: NewGates) -> GatesVersion:
    """Set the gates: running requests finish with the old ones, new requests wait."""
    served: Rollouts = request.app.state.rlkv_rollouts
    try:
        return GatesVersion(version=await served.updater.set(body.gates))
    except RlkvError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error


@router.post("/v1/rlkv/rollouts", responses=_REFUSALS)
async def roll_out(request: Request, body: RolloutRequest) -> RolloutAnswer:
    """Answer every prompt once, with log-probabilities and the version of the gates."""
    served: Rollouts = request.app.state.rlkv_rollouts
    tasks: list[asyncio.Task[RolledOut]] = []
    try:
        async with AsyncExitStack() as stack:
            if body.gates is not None:
                await stack.enter_async_context(served.updater.using(body.gates))
            tasks += [
                asyncio.create_task(served.answer(prompt, body.sampling, i))
                for i, prompt in enumerate(body.prompts)
            ]
            return RolloutAnswer(answers=await asyncio.gather(*tasks))
    except (ValueError, RlkvError) as error:  # vLLM's word for a prompt it cannot take
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
    finally:
        for task in tasks:  # a client that went away wants none of the others
            task.cancel()
