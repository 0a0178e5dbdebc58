"""The real server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from rlkv_vllm.bench.server import free_port

#: Engine start on two busy cores, the end of its processes, and an answer (seconds).
START_TIMEOUT_S, STOP_TIMEOUT_S, ANSWER_TIMEOUT_S = 300, 60, 60

#: API key of the shared server.
KEY = "secret"

RLKV = (sys.executable, "-m", "rlkv_vllm")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell, without the network and without what tests set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTEST_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **changes}


class Server:
    """``rlkv serve`` with its output in a file; a context manager that leaves nothing behind."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        command: Sequence[str] = (*RLKV, "serve"),
        **variables: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(**variables),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the server did not start:\n{self.output()}")
            time.sleep(0.5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=ANSWER_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self, title: str = "") -> list[psutil.Process]:
        """Processes of the server whose title has this in it."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if title in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def end_of(self, children: Sequence[psutil.Process]) -> tuple[int, list[psutil.Process]]:
        """Wait for the end; the exit status, and those of its processes that outlive it."""
        return self.process.wait(STOP_TIMEOUT_S), outliving(children)

    def kill(self) -> None:
        """Kill what the user started, whatever state it is in: the rest must end by itself."""
        try:
            children = self.children()
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        finally:
            self.process.wait(STOP_TIMEOUT_S)
        assert not outliving(children)


def outliving(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within a minute."""
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=ANSWER_TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def wait_for(what: Callable[[], bool], seconds: float = STOP_TIMEOUT_S) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.2)
    return what()
