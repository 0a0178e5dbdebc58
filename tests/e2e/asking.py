"""Questions to the embedded reasoner and its answers."""

from __future__ import annotations

from typing import Any

import openai

from rlkv_vllm.testbed.problems import ANSWER, FAMILIES, ReasonedProblem, make_problems
from tests.e2e.server import KEY, Server

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


def is_right(content: str | None, problem: ReasonedProblem) -> bool:
    return content is not None and content.split() == [ANSWER, problem.answer]
