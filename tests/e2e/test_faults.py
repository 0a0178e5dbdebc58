"""What breaks around a server, and what must happen then: docs/developer/faults.md.

Two servers run beside the shared one, and die: two engine starts for all tests here.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from rlkv_vllm.bench.server import free_port
from rlkv_vllm.profile.lookup import find_profile
from tests.support.asking import ask, client_of, problems
from tests.support.machine import ranks_lock
from tests.support.server import (
    ANSWER_TIMEOUT_S,
    KEY,
    RLKV,
    STOP_TIMEOUT_S,
    Server,
    environment,
    metric,
    wait_for,
)

_WORD = "lorpus"  # stands in every question of the testbed's chains


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "mine.json"
    shutil.copy(find_profile("embedded")[1], path)
    return path


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 1 MiB, or where none may be mounted a folder."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "disk", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Clock:
    """The wall clock of a server, which libfaketime reads from a file every second."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
        self.jump("+0")

    def jump(self, offset: str) -> None:
        """To the real time and so much, such as ``-3d``."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.replace(self._file)

    def variables(self) -> dict[str, str]:
        """Of the server's environment; none where libfaketime is not installed."""
        if self._library is None:
            return {}
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def second(server: Server, profile: Path, disk: Path, clock: Clock) -> Iterator[Server]:
    """Two servers on one machine: started while the shared one runs."""
    flags = ["--api-key", KEY, "--profile", str(profile)]
    with Server(flags, disk / "log", **clock.variables()) as running:
        yield running


@pytest.fixture
def third(server: Server, tmp_path: Path) -> Iterator[Server]:
    """Two workers."""
    flags = ["--api-key", KEY, "--tensor-parallel-size", "2"]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with ranks_lock(), Server(flags, tmp_path / "log", **variables) as running:
        yield running


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


def test_a_disk_that_fills_under_the_log_stops_nothing(second: Server, disk: Path) -> None:
    if not disk.is_mount():
        pytest.skip("mounts a file system, which needs root")

    def is_logged(within: float) -> bool:
        """Whether a request that is refused leaves a line, after so many seconds at most."""
        size = second.log.stat().st_size
        with pytest.raises(openai.BadRequestError):
            client_of(second).completions.create(model="embedded", prompt="")
        return wait_for(lambda: second.log.stat().st_size > size, within)

    before = ask(client_of(second), problems(1)[0]).choices[0].message.reasoning
    assert is_logged(STOP_TIMEOUT_S)
    rest = disk / "rest"
    with rest.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    assert shutil.disk_usage(disk).free == 0
    while is_logged(1):
        pass  # what its last page still holds
    assert ask(client_of(second), problems(1)[0]).choices[0].message.reasoning == before
    assert second.is_healthy()
    rest.unlink()
    assert is_logged(STOP_TIMEOUT_S)


def test_a_wall_clock_that_jumps_changes_no_answer(second: Server, clock: Clock) -> None:
    """By days, forward and to before the server's start, in the middle of an answer."""
    if not clock.variables():
        pytest.skip("libfaketime is missing: apt-get install libfaketime")
    day = 86_400

    def answer(max_tokens: int = 150) -> Any:
        extra = {"ignore_eos": True}
        return ask(client_of(second), problems(1)[0], max_tokens=max_tokens, extra_body=extra)

    def is_ahead_by(seconds: int) -> bool:
        return abs(answer(1).created - time.time() - seconds) < day / 2

    def begun(pool: ThreadPoolExecutor) -> Future[Any]:
        """An answer that is being written, if it is not too quick to be seen each time."""
        for _ in range(20):
            running = pool.submit(answer)
            while not running.done():
                if metric(second, "vllm:num_requests_running") >= 1:
                    return running
        raise AssertionError("no request was seen running")

    before = answer().choices
    with ThreadPoolExecutor(1) as pool:
        for offset, days in (("+3d", 3), ("-3d", -3), ("+0", 0)):
            running = begun(pool)
            clock.jump(offset)
            assert running.result().choices == before
            assert wait_for(lambda seconds=days * day: is_ahead_by(seconds))
            assert answer().choices == before
    assert second.is_healthy()


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
    port = str(free_port())
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*RLKV, "serve", "--port", port],
            env=environment(),
            stdout=full,
            stderr=full,
            timeout=STOP_TIMEOUT_S,
            check=False,
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
            with urllib.request.urlopen(f"{server.url}/health", timeout=ANSWER_TIMEOUT_S) as answer:
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
