"""The embedded reasoner over HTTP, through the official client.

The shared server ends in the last test of this module: modules that use it sort before.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.asking import ask, client_of, is_right, problems
from tests.support.drain import check_drain
from tests.support.server import ANSWER_TIMEOUT_S, KEY, Server


def test_right_answers_with_the_reasoning_separated(client: openai.OpenAI) -> None:
    asked = problems(per_family=10)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda problem: ask(client, problem), asked))
    right = 0
    for problem, reply in zip(asked, replies, strict=True):
        message = reply.choices[0].message
        right += is_right(message.content, problem)
        assert "think>" not in (message.content or "")
        assert "think>" not in message.reasoning
        usage = reply.usage
        assert usage.completion_tokens >= len(message.reasoning.split()) > 20
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert right >= 0.9 * len(asked)


def test_streaming_says_the_same_in_order(client: openai.OpenAI) -> None:
    for problem in problems(per_family=1):
        whole = ask(client, problem).choices[0].message
        reasoning, content, usage, last_part = "", "", None, "reasoning"
        chunks = 0
        for chunk in ask(client, problem, stream=True, stream_options={"include_usage": True}):
            chunks += 1
            if chunk.usage is not None:
                usage = chunk.usage
            if not chunk.choices:
                continue
            delta = chunk.choices[0].delta
            if getattr(delta, "reasoning", None):
                assert last_part == "reasoning"
                reasoning += delta.reasoning
            if delta.content:
                last_part = "content"
                content += delta.content
        assert reasoning.split() == whole.reasoning.split()
        assert content.split() == whole.content.split()
        assert chunks > 20
        assert usage is not None
        assert usage.completion_tokens > 20


def test_a_stream_tells_usage_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(ask(client, problems(per_family=1)[0], stream=True, max_tokens=5))
    assert all(chunk.usage is None for chunk in chunks)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]


def test_another_model_name_is_unknown(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a="}])


def test_without_the_key_nothing_is_answered(server: Server) -> None:
    stranger = client_of(server, "wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.AuthenticationError):
        ask(stranger, problems(per_family=1)[0])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/v1/models", timeout=ANSWER_TIMEOUT_S)


def test_health_and_metrics_need_no_key(server: Server) -> None:
    assert server.is_healthy()
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=ANSWER_TIMEOUT_S) as answer:
        assert b"vllm:generation_tokens_total" in answer.read()


def test_a_prompt_that_is_too_long_is_refused_and_the_server_lives(
    client: openai.OpenAI, server: Server
) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="embedded", messages=[{"role": "user", "content": "a= " * 5000}]
        )
    assert server.is_healthy()


def test_start_up_told_phases_savings_and_an_example(server: Server) -> None:
    output = server.output()
    told = [
        "checking profile, model and flags",
        "starting the engine for embedded",
        "loading weights",
        "as read back from the engine",
        "split cache",
        "KV heads",
        "cache bytes per token",
        "requests at once",
        f"curl {server.url}/v1/chat/completions",
        "ready; Ctrl-C stops the server",
    ]
    place = 0
    for text in told:
        place = output.find(text, place)
        assert place >= 0, f"{text!r} is missing or out of order:\n{output}"
    assert "Traceback" not in output
    assert KEY not in output
    lines = output[:place].splitlines()
    assert [line for line in lines if not line.startswith(("rlkv ", "  "))] == []
    assert "Triton" not in output


def test_sigterm_lets_requests_finish_and_ends_everything_with_status_0(
    server: Server, client: openai.OpenAI
) -> None:
    assert check_drain(server, client) > 0
