"""Requests that nobody should send: an error with a reason each, and the server lives on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from tests.support.asking import ask, is_right, problems
from tests.support.server import KEY, Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "a="}]


def post(server: Server, path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    """Status and text of the answer, whatever it is."""
    request = urllib.request.Request(
        server.url + path,
        data=body,
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": kind},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def message(text: str) -> str:
    """The reason: in vLLM's error, or in FastAPI's where the body could not be read at all."""
    answer = json.loads(text)
    return str(answer["error"]["message"] if "error" in answer else answer["detail"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b"{"),
        (CHAT, b""),
        (CHAT, b"[]"),
        (CHAT, b"null"),
        (CHAT, b'"text"'),
        (CHAT, b"\xff\xfe\x00"),
        (CHAT, b'{"model": "embedded", "messages": [' + b"[" * 5000 + b"]" * 5000 + b"]}"),
        (COMPLETIONS, b"{'model': 'embedded'}"),
        (COMPLETIONS, b'{"model": "embedded", "prompt": "a=", "temperature": NaN}'),
        (COMPLETIONS, b'{"model": "embedded", "prompt": "a=", "top_p": 1e999}'),
        (COMPLETIONS, b'{"model": "embedded", "prompt": "a=", "seed": ' + b"9" * 5000 + b"}"),
    ],
    ids=["cut", "empty", "list", "null", "string", "no text", "deep", "python"]
    + ["not a number", "infinity", "long number"],
)
def test_what_is_no_json_object(server: Server, path: str, body: bytes) -> None:
    status, text = post(server, path, body)
    assert 400 <= status < 500, text
    assert message(text)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, ""),
        ({"messages": None}, ""),
        ({"messages": [{"content": "a="}]}, "role"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": "two"}, "n"),
        ({"stop": 7}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": "perhaps"}, "stream"),
        ({"logprobs": True, "top_logprobs": 1000}, "logprobs"),
        ({"response_format": {"type": "poem"}}, ""),
        ({"structured_outputs": {"regex": "("}}, ""),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, ""),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, ""),
        ({"tools": "hammer"}, "tools"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"max_tokens": 10**30}, ""),
        ({"n": 10**9}, "n"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 1e308}, "presence_penalty"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"prompt_logprobs": 10**6}, "logprobs"),
        ({"truncate_prompt_tokens": -7}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]}, ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "",
        ),
        ({"chat_template": "{% for %}"}, ""),
    ],
    ids=str,
)
def test_wrong_types_and_values(server: Server, changes: dict[str, Any], word: str) -> None:
    body = {"model": "embedded", "messages": HELLO, "max_tokens": 4} | changes
    status, text = post(server, CHAT, json.dumps(body).encode())
    assert 400 <= status < 500, text
    assert word in message(text)


@pytest.mark.parametrize(
    "prompt",
    [[10**6], [-1], [2**70], [1.5], ["a", 3], [[5], [10**6]], {}, None, [], ""],
    ids=str,
)
def test_wrong_token_ids(server: Server, prompt: object) -> None:
    body = {"model": "embedded", "prompt": prompt, "max_tokens": 4}
    status, text = post(server, COMPLETIONS, json.dumps(body).encode())
    assert 400 <= status < 500, text
    assert message(text)


def test_an_unknown_model(server: Server) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a="})):
        status, text = post(server, path, json.dumps(body | {"model": "gpt-4"}).encode())
        assert status == 404
        assert "gpt-4" in message(text)


def test_more_than_the_context_holds(server: Server) -> None:
    for body in (
        {"prompt": "a= " * 5000, "max_tokens": 4},
        {"prompt": [40] * 5000, "max_tokens": 4},
        {"prompt": "a= " * 2_000_000, "max_tokens": 4},
        {"prompt": "a=", "max_tokens": 10**6},
    ):
        status, text = post(server, COMPLETIONS, json.dumps(body | {"model": "embedded"}).encode())
        assert status == 400, text
        assert "2048" in message(text)
    # A prompt that fits may ask for more than is left: vLLM gives what is left.
    body = {"model": "embedded", "prompt": "a= " * 2000, "max_tokens": 200, "ignore_eos": True}
    status, text = post(server, COMPLETIONS, json.dumps(body).encode())
    assert status == 200
    assert json.loads(text)["usage"]["total_tokens"] == 2048


def test_wrong_paths_and_methods(server: Server) -> None:
    assert post(server, "/v1/poems", b"{}")[0] == 404
    assert post(server, "/v1/models", b"{}")[0] == 405
    body = json.dumps({"model": "embedded", "messages": HELLO}).encode()
    assert 400 <= post(server, CHAT, body, "text/plain")[0] < 500


def test_after_all_of_it_the_server_answers_rightly(server: Server, client: openai.OpenAI) -> None:
    assert server.is_healthy()
    right = [is_right(ask(client, p).choices[0].message.content, p) for p in problems(1)]
    assert sum(right) >= len(right) - 1
    assert "Traceback" not in server.output()
