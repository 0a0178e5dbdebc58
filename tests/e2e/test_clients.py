"""Other people's clients against the server: what they hand on, as docs/clients.md says.

The official client is used by all other tests.
"""

from __future__ import annotations

import litellm
import pytest
from langchain_openai import ChatOpenAI

from rlkv_vllm.testbed.problems import ReasonedProblem
from tests.e2e.asking import is_right, problems
from tests.e2e.server import KEY, Server

#: Of litellm's own types.
pytestmark = pytest.mark.filterwarnings("ignore:.*ReadOnly.*:UserWarning")


@pytest.fixture
def problem() -> ReasonedProblem:
    return problems(per_family=1)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_hands_the_reasoning_on(
    server: Server, problem: ReasonedProblem, stream: bool
) -> None:
    reply = litellm.completion(
        model="openai/embedded",
        api_base=f"{server.url}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": problem.prompt}],
        temperature=0,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    if not stream:
        message, usage = reply.choices[0].message, reply.usage
        reasoning, content = message.reasoning_content, message.content
    else:
        reasoning = content = ""
        usage = None
        for chunk in reply:
            if chunk.choices:
                delta = chunk.choices[0].delta
                reasoning += getattr(delta, "reasoning_content", None) or ""
                content += delta.content or ""
            usage = getattr(chunk, "usage", None) or usage
    assert is_right(content, problem)
    assert len(reasoning.split()) > 20
    assert usage.completion_tokens > usage.completion_tokens_details.reasoning_tokens > 20


def langchain(server: Server, **options: bool) -> ChatOpenAI:
    return ChatOpenAI(
        model="embedded", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, **options
    )


def test_langchain_answers_and_counts_but_drops_the_reasoning(
    server: Server, problem: ReasonedProblem
) -> None:
    model = langchain(server, stream_usage=True)
    whole = model.invoke(problem.prompt)
    parts = list(model.stream(problem.prompt))
    streamed = parts[0]
    for part in parts[1:]:
        streamed += part
    assert len(parts) > 3
    for message in (whole, streamed):
        assert is_right(message.content, problem)
        assert "reasoning" not in message.additional_kwargs
        usage = message.usage_metadata
        assert usage["output_tokens"] > usage["output_token_details"]["reasoning"] > 20


def test_langchain_hands_the_reasoning_on_in_responses_mode(
    server: Server, problem: ReasonedProblem
) -> None:
    message = langchain(server, use_responses_api=True).invoke(problem.prompt)
    assert is_right(message.text, problem)
    (block,) = (block for block in message.content if block["type"] == "reasoning")
    assert len(block["content"][0]["text"].split()) > 20
    assert message.usage_metadata["output_tokens"] > 20
