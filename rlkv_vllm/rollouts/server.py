"""Servers started with `rlkv serve --mode gated`, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.rollouts.protocol import Gates

#: The key of the servers, if they have one.
API_KEY_VARIABLE = "RLKV_ROLLOUT_API_KEY"


class ServerRollouts:
    """Several servers of one model; follows `rlkv_vllm.rollouts.protocol.Rollouts`.

    Args:
        addresses: e.g. `http://127.0.0.1:8000`.
        span: sink and window of the job.

    Raises:
        RlkvError: a server cannot be reached, is not in gated mode, or has another sink or window.
    """

    def __init__(self, addresses: Sequence[str], span: Span) -> None:
        if not addresses:
            raise RlkvError("rollout.servers: is empty: give the address of a server")
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No limit on the time of an answer.
        timeout = httpx.Timeout(30, read=None)
        # The server drops idle connections after 5 seconds, which a step may take.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._clients = [
            httpx.Client(
                base_url=address.rstrip("/"), headers=headers, timeout=timeout, limits=limits
            )
            for address in addresses
        ]
        self._pool = ThreadPoolExecutor(len(self._clients))
        for client in self._clients:
            now = self._ask(client, "GET", "/v1/rlkv/gates")
            if (now["sink"], now["window"]) != span:
                raise RlkvError(
                    f"rollout.servers: {client.base_url} has sink {now['sink']} and window "
                    f"{now['window']}, the job {span.sink} and {span.window}: start it "
                    f"with --sink {span.sink} --window {span.window}"
                )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        """One answer per prompt, in their order; prompts are shared among the servers."""
        count = len(self._clients)
        values = [list(row) for row in gates]

        def ask(turn: int) -> list[Answer]:
            mine = [list(prompt) for prompt in prompts[turn::count]]
            if not mine:
                return []
            # Every server counts prompts from 0.
            options = sampling.model_dump(mode="json") | {
                "seed": (sampling.seed + turn * len(prompts)) % 2**31
            }
            body = {"prompts": mine, "sampling": options, "gates": values}
            answer = self._ask(self._clients[turn], "POST", "/v1/rlkv/rollouts", body)
            return [
                Answer(found["token_ids"], logprobs=found["logprobs"])
                for found in answer["answers"]
            ]

        parts = list(self._pool.map(ask, range(count)))
        return [parts[i % count][i // count] for i in range(len(prompts))]

    @staticmethod
    def _ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
        try:
            response = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise RlkvError(
                f"rollout.servers: {client.base_url} does not answer ({one_line(error)}): start "
                "it with `rlkv serve MODEL --mode gated`"
            ) from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RlkvError(
                f"rollout.servers: {client.base_url} is not in gated mode: start it with "
                "`rlkv serve MODEL --mode gated`"
            )
        if response.is_error:
            raise RlkvError(
                f"rollout.servers: {client.base_url} answered {response.status_code}: "
                f"{one_line(response.text, 300)} (its key: {API_KEY_VARIABLE})"
            )
        return response.json()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for client in self._clients:
            client.close()
