"""A demanding user and an attacker, from outside: keys, signals, kill -9, a machine that is odd."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.asking import ask, client_of, is_right, problems
from tests.support.server import (
    ANSWER_TIMEOUT_S,
    KEY,
    RLKV,
    START_TIMEOUT_S,
    Server,
    environment,
    outliving,
    wait_for,
)

#: Routes that are not in the app's own list.
UNLISTED = (
    *("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"),
    *("/health", "/metrics", "/rlkv", "/ping", "/version", "/load", "/server_info", "/nowhere"),
)
#: Seconds in which a server that loads, and an idle one, end; it was 60.
SOON_S = 10


# Keys


def status(
    server: Server, method: str, path: str, key: str = "", **headers: str
) -> tuple[int, bytes]:
    """Of a request that is sent as it stands; the answer's status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_TIMEOUT_S)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_every_route_needs_the_key_but_three(server: Server) -> None:
    listed = json.loads(status(server, "GET", "/openapi.json", KEY)[1])["paths"]
    routes = {
        (method.upper(), re.sub(r"{[^}]*}", "x", path))
        for path, methods in listed.items()
        for method in methods
    } | {("GET", path) for path in UNLISTED}
    for path in ("/invocations", "/tokenize", "/scale_elastic_ep", "/generative_scoring"):
        assert ("POST", path) in routes
    without = {route: status(server, *route)[0] for route in routes}
    assert {path for (_, path), answer in without.items() if answer != 401} == {
        *("/health", "/metrics", "/rlkv")
    }
    with_key = {route: status(server, *route, KEY)[0] for route in routes}
    assert 401 not in with_key.values()
    assert server.is_healthy()


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"])
def test_no_spelling_of_a_route_is_open(server: Server, method: str) -> None:
    for path in (
        *("/invocations/", "//invocations", "/%69nvocations", "/invocations?/health", "/Health"),
        *("/health/../invocations", "/health/", "//health", "/metrics/x", "/rlkv/", "/health;x"),
        f"http://127.0.0.1:{server.port}/invocations",
        "http://health/invocations",
    ):
        assert status(server, method, path)[0] == 401, path
    for headers in (
        {"X-Forwarded-Prefix": "/invocations", "X-Original-URL": "/health"},
        {"Authorization": KEY},
        {"Authorization": "Bearer "},
        {"X-Amzn-SageMaker-Session-Id": "x", "X-Amzn-SageMaker-Adapter-Identifier": "x"},
    ):
        assert status(server, method, "/invocations", **headers)[0] == 401, headers


def test_a_websocket_needs_the_key(server: Server) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert status(server, "GET", "/v1/realtime", **upgrade)[0] in (401, 403)


# Signals and kill -9


@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGINT, "starting the engine"), (signal.SIGTERM, "loading weights")],
)
def test_a_signal_ends_a_server_that_starts(tmp_path: Path, number: int, phase: str) -> None:
    server = Server([], tmp_path / "log")
    try:
        assert wait_for(lambda: phase in server.output(), START_TIMEOUT_S), server.output()
        children = server.children()
        assert children
        server.process.send_signal(number)
        assert server.process.wait(SOON_S) == 128 + number
        assert outliving(children) == []
    finally:
        server.kill()
    output = server.output()
    assert output.count("stopped") == 1
    assert output.rstrip().endswith("stopped")
    for word in ("Traceback", "error", "force killing", "could not start"):
        assert word not in output


@pytest.fixture(scope="module")
def threadless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """OMP_NUM_THREADS=0, which OpenMP does not allow."""
    log = tmp_path_factory.mktemp("threadless") / "log"
    with Server(["--api-key", KEY], log, OMP_NUM_THREADS="0") as running:
        yield running


def test_no_threads_are_as_many_as_there_are_cores(threadless: Server) -> None:
    problem = problems(per_family=1)[0]
    assert is_right(ask(client_of(threadless), problem).choices[0].message.content, problem)


def test_a_server_that_is_killed_leaves_nothing_and_says_so(threadless: Server) -> None:
    """Under load, as the kernel does when memory runs out."""
    children = threadless.children()
    options = {"max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = ask(client_of(threadless), problems(per_family=1)[0], **options)
    next(stream)
    (process,) = psutil.Process(threadless.process.pid).children()
    process.kill()
    assert threadless.end_of(children) == (128 + signal.SIGKILL, [])
    assert threadless.output().rstrip().splitlines()[-1].count("killed by SIGKILL") == 1


# A machine without shared memory


def test_a_full_shared_memory_is_told_in_one_line() -> None:
    unshare = ["unshare", "--mount"]
    mount = "mount -t tmpfs -o size=64k shm /dev/shm && head -c 65536 /dev/zero >/dev/shm/full"
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount]).returncode:
        pytest.skip("mounts a file system, which needs root")
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{mount}; exec "$@"', "sh", *RLKV, "serve", "--port", "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlkv: error: ")]
    assert "Insufficient space in /dev/shm" in line
    assert "240 MiB required" in line
    assert "Traceback" not in done.stderr
    assert "starting the engine" not in done.stdout
