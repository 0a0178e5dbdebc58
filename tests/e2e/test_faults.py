"""What breaks around a server, and what must happen then: docs/faults.md.

Two servers run beside the shared one, and die: two engine starts for all tests here.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from rlkv_vllm.profile.lookup import find_profile
from tests.e2e.asking import ask, problems
from tests.e2e.server import KEY, RLKV, STOP_TIMEOUT_S, Server, environment, metric, wait_for

_WORD = "lorpus"  # stands in every question of the testbed's chains


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "mine.json"
    shutil.copy(find_profile("embedded")[1], path)
    return path


@pytest.fixture(scope="module")
def second(
    server: Server, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two servers on one machine: started while the shared one runs."""
    log = tmp_path_factory.mktemp("second") / "log"
    with Server(["--api-key", KEY, "--profile", str(profile)], log) as running:
        yield running


@pytest.fixture(scope="module")
def third(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers."""
    flags = ["--api-key", KEY, "--tensor-parallel-size", "2"]
    log = tmp_path_factory.mktemp("third") / "log"
    with Server(flags, log, VLLM_CPU_OMP_THREADS_BIND="nobind") as running:
        yield running


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def is_idle(server: Server) -> bool:
    return (
        metric(server, "vllm:num_requests_running") == 0
        and metric(server, "vllm:num_requests_waiting") == 0
        and metric(server, "vllm:kv_cache_usage_perc") == 0
    )


def test_clients_that_vanish_leave_nothing_behind(server: Server, client: openai.OpenAI) -> None:
    """Connections cut in the middle of a stream: the requests end and all blocks come back."""
    host, port = "127.0.0.1", server.port
    for problem in problems(2):
        body = json.dumps(
            {
                "model": "embedded",
                "messages": [{"role": "user", "content": problem.prompt}],
                "stream": True,
                "ignore_eos": True,
                "max_tokens": 1500,
            }
        )
        with socket.create_connection((host, port), timeout=60) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert b"200 OK" in connection.recv(4096)
    assert wait_for(lambda: is_idle(server), 120)
    assert ask(client, problems(1)[0]).choices[0].message.reasoning


def test_two_servers_answer_alike(server: Server, second: Server, client: openai.OpenAI) -> None:
    asked = problems(1)
    with ThreadPoolExecutor(8) as pool:
        ours = pool.map(lambda p: ask(client, p), asked)
        theirs = pool.map(lambda p: ask(client_of(second), p), asked)
    for a, b in zip(ours, theirs, strict=True):
        assert a.choices[0].message.reasoning == b.choices[0].message.reasoning


def test_the_port_of_a_running_server_is_refused(server: Server) -> None:
    done = subprocess.run(
        [*RLKV, "serve", "--host", "127.0.0.1", "--port", str(server.port)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"rlkv: error: --port {server.port}: in use" in done.stderr


def test_a_profile_replaced_on_disk_changes_nothing_that_runs(
    second: Server, profile: Path
) -> None:
    before = ask(client_of(second), problems(1)[0]).choices[0].message.reasoning
    profile.write_text("not a profile any more")
    assert ask(client_of(second), problems(1)[0]).choices[0].message.reasoning == before
    profile.unlink()
    assert second.is_healthy()


def test_an_engine_that_dies_takes_its_server_along(server: Server, second: Server) -> None:
    kill_under_load(second, "EngineCore")
    assert "ended by itself, so the server ends too" in second.output()
    assert server.is_healthy(), "the other server is none of its business"


def test_a_server_without_space_for_its_first_line_does_not_start() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*RLKV, "serve"], env=environment(), stdout=full, stderr=full, timeout=60, check=False
        )
    assert done.returncode != 0


def test_a_worker_that_dies_takes_its_server_along(server: Server, third: Server) -> None:
    kill_under_load(third, "Worker_TP1")
    assert server.is_healthy()


def kill_under_load(server: Server, title: str) -> None:
    """Clients get errors, and the server ends with status 1 and without leaving anything."""
    children = server.children()
    (victim,) = server.children(title)
    health: set[int] = set()

    def is_gone() -> bool:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                health.add(answer.status)
        except urllib.error.HTTPError as error:
            health.add(error.code)
        except OSError:
            return True  # it listens no more
        return False

    def request() -> str:
        try:
            ask(client_of(server), problems(1)[0], extra_body={"ignore_eos": True})
        except openai.APIError as error:
            return type(error).__name__
        return "answered"

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(request) for _ in range(4)]
        assert wait_for(lambda: metric(server, "vllm:num_requests_running") >= 1)
        victim.kill()
        assert wait_for(is_gone)
        outcomes = [future.result(STOP_TIMEOUT_S) for future in running]
    assert health <= {200, 503}  # 200 until its death is noticed
    assert set(outcomes) <= {"InternalServerError", "APIConnectionError", "APIError"}
    assert server.end_of(children) == (1, [])


def test_logs_hold_no_prompt_no_answer_and_no_key(server: Server, client: openai.OpenAI) -> None:
    asked = next(p for p in problems(3) if _WORD in p.prompt)
    reasoning = ask(client, asked).choices[0].message.reasoning
    before = server.output()
    # The start-up example is the only question in it.
    assert asked.prompt not in before
    assert reasoning not in before
    assert KEY not in before
    for line in before.splitlines():
        assert "curl" in line or "-d '" in line or _WORD not in line, line
