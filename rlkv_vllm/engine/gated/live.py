"""Change the gates of a running engine in gated mode, so that no answer mixes two versions.

The gates of an engine have a version, which counts up from 0 (all gates 1). vLLM stamps it on
every answer (``CompletionOutput.weight_versions``). They change while no request runs, and the
prefix cache is emptied with them: keys and values of earlier gates are those of another model.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.engine.sampling import vllm_sampling
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams
    from vllm.engine.protocol import EngineClient

Gates = Sequence[Sequence[float]]

GET_METHOD, SET_METHOD = "rlkv_gates", "rlkv_set_gates"
_PREFIX = "gates-"


@dataclass(frozen=True)
class LiveGates:
    """The gates of all workers, ``[layers][KV heads]``, and how often they were set."""

    version: int
    gates: list[list[float]]

    @classmethod
    def of(cls, answers: Sequence[dict[str, Any]]) -> LiveGates:
        """Put the answers of an engine's workers together, which must be equal and have gates."""
        if not answers or not all(answer["gates"] for answer in answers):
            raise RlkvError(
                "this engine has no gates: start it with `rlkv serve --mode gated`, or with "
                'additional_config={"rlkv": {"mode": "gated"}}'
            )
        versions = {answer["version"] for answer in answers}
        if len(versions) > 1:
            raise RlkvError(f"the workers have gates of versions {sorted(versions)}: restart them")
        layers: list[dict[int, float]] = [{} for _ in answers[0]["gates"]]
        for answer in answers:
            for row, heads, gates in zip(layers, answer["kv_heads"], answer["gates"], strict=True):
                row.update(zip(heads, gates, strict=True))
        return cls(versions.pop(), [[row[head] for head in sorted(row)] for row in layers])

    def check(self, gates: Gates) -> list[list[float]]:
        """The gates, of the model's shape and in [0, 1], as the float32 numbers of a worker."""
        shape = [len(row) for row in gates]
        expected = [len(row) for row in self.gates]
        if shape != expected:
            raise RlkvError(
                f"gates: {len(shape)} layers of {_counts(shape)} KV heads, the model has "
                f"{len(expected)} of {_counts(expected)}"
            )
        for layer, row in enumerate(gates):
            for head, gate in enumerate(row):
                if not 0 <= gate <= 1:  # nor NaN
                    raise RlkvError(
                        f"gates: {gate} of layer {layer}, head {head}: must be from 0 to 1"
                    )
        return [array("f", row).tolist() for row in gates]


def _counts(shape: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(set(shape)))) or "0"


def get_gates(llm: LLM) -> LiveGates:
    """The gates of an engine; raises as `LiveGates.of`."""
    return LiveGates.of(llm.collective_rpc(GET_METHOD))


def set_gates(llm: LLM, gates: Gates) -> int:
    """Give an engine in gated mode these gates, between two calls of ``generate``.

    ``gates`` are ``[layers][KV heads]``, in [0, 1].

    Returns:
        Their version; the present one if the engine has these gates.

    Raises:
        RlkvError: not in gated mode, wrong gates, or requests are running.
    """
    engine = llm.llm_engine
    if engine.has_unfinished_requests():
        raise RlkvError("gates cannot change while requests run: let them finish first")
    now = get_gates(llm)
    checked, version = now.check(gates), now.version + 1
    if checked == now.gates:
        return now.version
    llm.collective_rpc(SET_METHOD, args=(checked, version))
    if not llm.reset_prefix_cache():
        raise RlkvError("the prefix cache of earlier gates cannot be emptied: restart the engine")
    engine.set_weight_version(f"{_PREFIX}{version}")
    return version


class GatesUpdater:
    """Reads and sets the gates of one server's engine.

    Requests that run when gates are set finish with the earlier gates; those that arrive in the
    meantime wait, and so do requests for other gates than those in use.
    """

    def __init__(self, engine_client: EngineClient, now: LiveGates) -> None:
        self._engine = engine_client
        self._free = asyncio.Condition()
        self._users = 0
        self.now = now

    @asynccontextmanager
    async def using(self, gates: Gates) -> AsyncIterator[int]:
        """Set them if the engine has others, keep them to the block's end; gives their version.

        Wrong gates are an `RlkvError`, and nothing has changed.
        """
        checked = self.now.check(gates)
        async with self._free:
            await self._free.wait_for(lambda: checked == self.now.gates or not self._users)
            if checked != self.now.gates:
                await self._set(checked)
            self._users += 1
            version = self.now.version
        try:
            yield version
        finally:
            # Shielded: a client that goes away must not keep the gates for ever.
            await asyncio.shield(self._leave())

    async def _leave(self) -> None:
        async with self._free:
            self._users -= 1
            self._free.notify_all()

    async def _set(self, gates: list[list[float]]) -> None:
        version = self.now.version + 1
        await self._engine.pause_generation(mode="wait", clear_cache=True)
        try:
            await self._engine.collective_rpc(SET_METHOD, args=(gates, version))
            await self._engine.update_weight_version(f"{_PREFIX}{version}")
            self.now = LiveGates.of(await self._engine.collective_rpc(GET_METHOD))
        finally:
            await self._engine.resume_generation()

    async def set(self, gates: Gates) -> int:
        """As :meth:`using`, but does not keep them; returns their version."""
        async with self.using(gates) as version:
            return version


def gates_version(completion: CompletionOutput) -> int:
    """The version of the gates that an answer was sampled with; several are refused."""
    names = {span.version for span in completion.weight_versions or ()}
    if len(names) != 1:
        raise RlkvError(f"an answer was sampled with {len(names)} versions of the gates")
    name = names.pop()
    return int(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else 0


def sampling_params(sampling: Sampling, index: int) -> SamplingParams:
    """For the answer to a rollout's prompt of this index, with log-probabilities."""
    from vllm.sampling_params import RequestOutputKind

    return vllm_sampling(
        sampling,
        index,
        ignore_eos=True,  # what ends an answer is in stop_token_ids
        logprobs=0,  # of the sampled token
        flat_logprobs=True,  # no objects per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def rolled_out(completion: CompletionOutput) -> dict[str, Any]:
    """A finished answer: its ``token_ids``, their ``logprobs``, and its ``gates_version``."""
    from vllm.logprobs import FlatLogprobs

    logprobs = completion.logprobs
    assert isinstance(logprobs, FlatLogprobs)
    assert logprobs.token_ids == list(completion.token_ids)
    return {
        "token_ids": logprobs.token_ids,
        "logprobs": logprobs.logprobs,
        "gates_version": gates_version(completion),
    }
