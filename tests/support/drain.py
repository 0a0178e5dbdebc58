"""The end of a server that answers."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import openai

from tests.support.asking import ask, problems
from tests.support.server import Server


def check_drain(server: Server, client: openai.OpenAI) -> int:
    """After SIGTERM what runs is answered, and new requests get 503 at once, none gets a 500.

    Returns:
        How many got 503; who comes when the server is gone finds nobody.
    """
    children = server.children()
    options = {"max_tokens": 150, "stream": True, "extra_body": {"ignore_eos": True}}
    running = [ask(client, problem, **options) for problem in problems(per_family=1)[:4]]
    for stream in running:
        next(stream)
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(lambda stream: list(stream)[-1], stream) for stream in running]
        late = [pool.submit(_ask_until_refused, client) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        errors = [each.result() for each in late]
        assert [end.result().choices[0].finish_reason for end in ends] == ["length"] * 4
        assert server.end_of(children) == (0, [])
    refused = [error for error in errors if isinstance(error, openai.APIStatusError)]
    others = [error for error in errors if not isinstance(error, openai.APIStatusError)]
    assert all(isinstance(error, openai.APIConnectionError) for error in others)
    for error in refused:
        assert error.status_code == 503
        assert error.response.headers["Retry-After"] == "10"
        assert "stopping" in error.message
    assert "Traceback" not in server.output()
    return len(refused)


def _ask_until_refused(client: openai.OpenAI) -> openai.APIError:
    """Short requests one after the other; each is answered until one is refused."""
    while True:
        try:
            answer = ask(client, problems(per_family=1)[0], max_tokens=2)
        except openai.APIError as error:
            return error
        assert answer.usage.completion_tokens == 2
