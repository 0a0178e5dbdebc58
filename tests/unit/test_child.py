"""A child process that answers questions, and all the ways in which it can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlkv_vllm.child import Child
from rlkv_vllm.errors import RlkvError


def adder(start: int) -> tuple[int, Callable[[Any], Any]]:
    """Replies with the sum so far."""
    total = [start]

    def answer(number: int) -> int:
        total[0] += number
        return total[0]

    return os.getpid(), answer


def does_what_it_is_told() -> tuple[Any, Callable[[Any], Any]]:
    """A child for all accidents."""
    print("ready", flush=True)

    def answer(order: str) -> Any:
        if order == "refuse":
            raise RlkvError("gates: wrong shape")
        if order == "raise":
            raise KeyError("no such thing")
        if order == "end of file":
            raise EOFError("a file was cut off")
        if order == "lambda":
            return lambda: None
        if order == "exit":
            sys.exit(7)
        if order == "die":
            print("SomeError: the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "die with a child of its own":
            # A fork holds the child's end of the pipe, as vLLM's workers do.
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "environment":
            return os.environ.get("RLKV_TEST_A"), os.environ.get("RLKV_TEST_B")
        return order

    return None, answer


def raises_at_once(error: BaseException) -> tuple[Any, Callable[[Any], Any]]:
    raise error


def pid_in_a_file(path: str) -> tuple[Any, Callable[[Any], Any]]:
    Path(path).write_text(str(os.getpid()))
    return None, time.sleep


def test_questions_and_replies(tmp_path: Path) -> None:
    with Child("the adder", adder, 5, log=tmp_path / "log") as child:
        assert child.started != os.getpid()
        assert [child.ask(n) for n in (1, 2, 3)] == [6, 8, 11]
    assert not psutil.pid_exists(child.started)
    assert not (tmp_path / "log").exists()


def test_the_environment_is_the_childs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKV_TEST_B", "parent")
    changes = {"RLKV_TEST_A": "child", "RLKV_TEST_B": None}
    with Child("it", does_what_it_is_told, environment=changes) as child:
        assert child.ask("environment") == ("child", None)
    assert "RLKV_TEST_A" not in os.environ
    assert os.environ["RLKV_TEST_B"] == "parent"


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("raise", "it: KeyError: 'no such thing' (log: "),
        ("end of file", "it: EOFError: a file was cut off (log: "),
        ("lambda", "it: "),
        ("exit", "it ended with status 7: ready (log: "),
        ("die", "it was killed by signal 9: SomeError: the last words (log: "),
        ("die with a child of its own", "it was killed by signal 9"),
    ],
)
def test_failures_are_one_line_and_leave_the_log(order: str, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Child("it", does_what_it_is_told, log=log, advice="try less") as child:
        with pytest.raises(RlkvError) as error:
            child.ask(order)
        assert str(error.value).startswith(words)
        assert "\n" not in str(error.value)
        if "status" in words or "signal" in words:
            assert str(error.value).endswith("; try less")
        with pytest.raises(RlkvError, match="try less"):
            child.ask("anything")
    assert log.read_text().startswith("ready")


def test_a_refusal_is_told_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        Child("it", does_what_it_is_told, log=log) as child,
        pytest.raises(RlkvError, match=r"^gates: wrong shape$"),
    ):
        child.ask("refuse")
    assert not log.exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RlkvError("no such model"), "^no such model$"),
        (OSError("no space\nleft"), r"^it: OSError: no space left \(log: "),
        (SystemExit(3), "^it ended with status 3: it said nothing"),
    ],
)
def test_setup_may_raise_anything(error: BaseException, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("OldError: of an earlier run\n")
    with pytest.raises(RlkvError, match=words):
        Child("it", raises_at_once, error, log=log)
    assert log.exists() == (not isinstance(error, RlkvError))


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RlkvError, match="cannot be written"):
        Child("it", does_what_it_is_told, log=tmp_path / "file" / "log")


def test_a_busy_child_ends_with_its_parent(tmp_path: Path) -> None:
    """However the parent ends: here it is killed, and cannot say so."""
    script, file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(
        "from rlkv_vllm.child import Child\n"
        "from tests.unit.test_child import pid_in_a_file\n"
        "if __name__ == '__main__':\n"
        f"    Child('it', pid_in_a_file, {str(file)!r}).ask(600)\n"
    )
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    parent = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while psutil.pid_exists(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
