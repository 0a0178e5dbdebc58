"""A child process that answers questions: an engine beside a trainer, or one of a benchmark."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, write_text_atomic

#: Called in the child: gives the first reply, and the function that answers each question.
Setup = Callable[..., tuple[Any, Callable[[Any], Any]]]


class Child:
    """A process started anew (a fork would inherit threads), with one question at a time.

    It ends with its parent, however that ends, and after the first error. Ctrl-C is for the parent.

    Args:
        name: what it is, for errors, e.g. ``"the split engine"``.
        setup: a function of a module; runs in the child.
        args: for `setup`, picklable.
        environment: set before the child imports anything; None removes a variable.
        log: file for all that the child prints, kept only if the child fails for another reason
            than an `RlkvError`. None: the parent's stderr.
        advice: how to go on after its death, for errors.

    Attributes:
        started: the first reply.

    Raises:
        RlkvError: `setup` raised, the process died, or the log cannot be written.
    """

    def __init__(
        self,
        name: str,
        setup: Setup,
        *args: Any,
        environment: Mapping[str, str | None] = {},
        log: Path | None = None,
        advice: str = "out of memory?",
    ) -> None:
        self._name, self._log, self._advice = name, log, advice
        self._keep_log = False
        if log is not None:
            write_text_atomic(log, "")  # now: the child may die before it opens its log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, log, setup, args), name=name)
        with changed_environment(environment):
            self._process.start()
        theirs.close()
        try:
            self.started = self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Any) -> Any:
        """The reply to a question; an `RlkvError` if that function raised or the process died."""
        try:
            self._pipe.send(question)
        except OSError:
            raise self._died() from None
        return self._reply()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # an idle child ends by that
        self._process.join(5)
        self._process.terminate()
        self._process.join(10)
        self._process.kill()
        self._process.join()
        if self._log is not None and not self._keep_log:
            self._log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self) -> Any:
        try:
            # Processes that the child has started may keep its end of the pipe open after its
            # death: no end of file would ever come.
            while not self._pipe.poll(1):
                if not self._process.is_alive() and not self._pipe.poll():
                    raise self._died()
            problem, content = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if problem == _REFUSED:
            raise RlkvError(content)
        if problem == _FAILED:
            self._keep_log = True
            raise RlkvError(f"{self._name}: {content}{self._where()}")
        return content

    def _died(self) -> RlkvError:
        self._process.join(10)
        self._keep_log = True
        code = self._process.exitcode
        if code is None:
            how = "does not answer any more"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        said = ""
        if self._log is not None:
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
            errors = [line for line in lines if "Error" in line] or [line for line in lines if line]
            said = f": {errors[-1][-300:] if errors else 'it said nothing'}{self._where()}"
        return RlkvError(f"{self._name} {how}{said}; {self._advice}")

    def _where(self) -> str:
        return "" if self._log is None else f" (log: {self._log})"


#: What is wrong with a reply: the child raised an `RlkvError`, or anything else.
_REFUSED, _FAILED = "refused", "failed"


def _run(pipe: Connection, log: Path | None, setup: Setup, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Libraries write below Python, too.
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), 2)
    os.dup2(2, 1)
    try:
        reply, answer = setup(*args)
        while True:
            try:
                pipe.send((None, reply))
                question = pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return  # nobody listens any more
            reply = answer(question)
    except RlkvError as error:
        problem = _REFUSED, str(error)
    except Exception as error:  # whatever it is, the parent must hear of it
        traceback.print_exc()
        problem = _FAILED, f"{type(error).__name__}: {one_line(error)}"
    with suppress(OSError):
        pipe.send(problem)
    sys.exit(1)


def _end_with_parent() -> None:
    # Not by the pipe that multiprocessing has for it: the parent's other children may hold it.
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables of this process, changed while a child starts."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)
