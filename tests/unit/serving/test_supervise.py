"""The supervisor against small stand-ins for the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.server import outliving, wait_for

#: A server that ignores signals while it starts, as vLLM does, and has a child.
_SERVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from rlkv_vllm.serving.supervise import follow_supervisor, tell_supervisor
folder = Path(sys.argv[1])
follow_supervisor()
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids").write_text(f"{os.getpid()} {child.pid}")
if sys.argv[2] == "listens":
    def stop(number, frame):
        (folder / "signal").write_text(str(number))
        os._exit(7)
    signal.signal(signal.SIGTERM, stop)
    tell_supervisor()
    (folder / "ready").touch()
if sys.argv[2] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
_SUPERVISOR = """
import sys
from rlkv_vllm.serving.supervise import run_supervised
sys.exit(run_supervised([sys.executable, sys.argv[1], *sys.argv[2:]]))
"""


def start(folder: Path, how: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    (folder / "server.py").write_text(_SERVER)
    command = [sys.executable, "-c", _SUPERVISOR, str(folder / "server.py"), str(folder), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids = folder / "pids"
    assert wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    found = [
        psutil.Process(int(pid)) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))
    ]
    return process, found


def all_gone(processes: list[psutil.Process]) -> bool:
    return not outliving(processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_starts_a_signal_ends_all_at_once(tmp_path: Path, number: int) -> None:
    process, found = start(tmp_path, "loads")
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert time.monotonic() - began < 3
    assert process.stdout.read().count("stopped") == 1
    assert all_gone(found)


def test_a_listening_server_gets_the_signal(tmp_path: Path) -> None:
    process, found = start(tmp_path, "listens")
    assert wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))
    assert all_gone(found)


def test_a_server_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    process, found = start(tmp_path, "dies")
    assert process.wait(30) == 128 + signal.SIGKILL
    assert "error: the server was killed by SIGKILL" in process.stdout.read()
    assert all_gone(found)


def test_a_supervisor_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    process, found = start(tmp_path, "loads")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert all_gone(found)
