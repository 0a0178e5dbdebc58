"""Questions to the embedded reasoner and its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from rlkv_vllm.tasks.puzzles import ANSWER, FAMILIES, ReasonedProblem, make_problems
from tests.support.server import ANSWER_TIMEOUT_S, KEY, Server

SEED = 20261123  # not a seed of the training data


def client_of(server: Server, key: str = KEY) -> openai.OpenAI:
    """The official client; what fails is not tried again."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=key,
        max_retries=0,
        timeout=120,
        # Client and server both drop idle connections after 5 s: which comes first is a race.
        default_headers={"Connection": "close"},
    )


def problems(per_family: int) -> list[ReasonedProblem]:
    return [p for family in FAMILIES for p in make_problems(family, per_family, seed=SEED)]


def ask(client: openai.OpenAI, problem: ReasonedProblem, **options: Any) -> Any:
    return client.chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": problem.prompt}],
        temperature=0,
        **options,
    )


def while_answering(client: openai.OpenAI, is_enough: Callable[[], bool]) -> Iterator[None]:
    """Goes on while questions are answered, and for five minutes at most until there is enough."""
    asked = problems(per_family=8)
    deadline = time.monotonic() + 5 * ANSWER_TIMEOUT_S
    with ThreadPoolExecutor(16) as pool:
        replies = [pool.submit(ask, client, problem) for problem in asked]
        while True:
            if all(reply.done() for reply in replies):
                if is_enough() or time.monotonic() > deadline:
                    break
                replies += [pool.submit(ask, client, problem) for problem in asked]
            yield
    for reply in replies:
        reply.result()


def is_right(content: str | None, problem: ReasonedProblem) -> bool:
    return content is not None and content.split() == [ANSWER, problem.answer]
