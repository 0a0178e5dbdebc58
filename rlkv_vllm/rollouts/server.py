"""Servers started with `rlkv serve --mode gated`, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.rollouts.protocol import Gates

#: The key of the servers, if they have one.
API_KEY_VARIABLE = "RLKV_ROLLOUT_API_KEY"


class ServerRollouts(AbstractContextManager["ServerRollouts"]):
    """Several servers of one model; follows `rlkv_vllm.rollouts.protocol.Rollouts`.

    An `RlkvError` if one cannot be reached, is not in gated mode, or has another sink or window.
    """

    def __init__(self, addresses: Sequence[str], span: Span) -> None:
        if not addresses:
            raise RlkvError("rollout.servers: is empty: give the address of a server")
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._clients = [
            httpx.Client(
                base_url=address.rstrip("/"),
                headers=headers,
                timeout=httpx.Timeout(30, read=None),  # no limit on the time of an answer
                # The server drops idle connections after 5 seconds, which a step may take.
                limits=httpx.Limits(max_keepalive_connections=0),
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
            found = self._ask(self._clients[turn], "POST", "/v1/rlkv/rollouts", body)
            return [Answer(one["token_ids"], logprobs=one["logprobs"]) for one in found["answers"]]

        parts = list(self._pool.map(ask, range(count)))
        return [parts[i % count][i // count] for i in range(len(prompts))]

    @staticmethod
    def _ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
        server, fix = f"rollout.servers: {client.base_url}", "`rlkv serve MODEL --mode gated`"
        try:
            response = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise RlkvError(
                f"{server} does not answer ({one_line(error)}): start it with {fix}"
            ) from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RlkvError(f"{server} is not in gated mode: start it with {fix}")
        if response.is_error:
            raise RlkvError(
                f"{server} answered {response.status_code}: {one_line(response.text, 300)} (its "
                f"key: {API_KEY_VARIABLE})"
            )
        return response.json()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for client in self._clients:
            client.close()
