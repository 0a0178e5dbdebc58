"""Checks of other libraries, run in a process of their own.

math-verify and the scorers of reasoning-gym compute with what a model wrote: `9^9^9^9` would
never end, or fill the memory. math-verify's own time limit is a signal, which works in the main
thread only and does not reach long arithmetic. The process below ends itself when a check takes
too long, and the next check starts a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line

#: A check may take this long (seconds of CPU time, so that a busy machine decides nothing).
CPU_SECONDS = 5.0


class Checker:
    """A process that checks one answer after the other; safe to use from several threads.

    Args:
        cpu_seconds: what an answer may cost.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def score(self, request: dict[str, Any]) -> float:
        """What an answer is worth: 0 if checking it fails or takes too long.

        Args:
            request: as `rlkv_vllm.tasks.worker` takes it.

        Raises:
            RlkvError: if the check cannot be run at all.
        """
        reply = self.ask(request, self._cpu_seconds)
        return 0.0 if reply is None else float(reply["score"])

    def ask(self, request: dict[str, Any], cpu_seconds: float = 0) -> dict[str, Any] | None:
        """The reply to a request.

        Args:
            request: as `rlkv_vllm.tasks.worker` takes it.
            cpu_seconds: what it may cost, 0 for any amount.

        Returns:
            None if the process was killed over it: too long, or out of memory.

        Raises:
            RlkvError: if the process cannot be started or refuses the request.
        """
        line = json.dumps({**request, "cpu_seconds": cpu_seconds})
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:
                # Interrupted between request and reply: the next one would read this reply.
                process.kill()
                self._forget()
                raise
            if not answer.endswith("\n"):
                status = process.wait()
                self._forget()
                if status < 0:
                    return None
                raise RlkvError(
                    f"the process that checks answers ended with status {status}: install "
                    "'rlkv-vllm[train]' again, and look at what it printed"
                )
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            raise RlkvError(one_line(reply["error"], 400))
        return reply

    def close(self) -> None:
        """End the process, if there is one; the next request starts a new one."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._process.kill()
                self._process.wait()
                self._forget()

    def _running(self) -> subprocess.Popen[str]:
        # After a fork the pipes belong to the parent.
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._forget()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Some of reasoning-gym's generators go through sets of words.
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", "rlkv_vllm.tasks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                encoding="utf-8",
                # Ctrl-C is for the parent, at whose end this one reads the end of its input.
                start_new_session=True,
            )
        except OSError as error:
            raise RlkvError(
                f"{sys.executable}: the process that checks answers cannot be started "
                f"({one_line(error)}): free memory or processes"
            ) from error
        self._owner = os.getpid()
        return self._process

    def _forget(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._process = None


#: The one that all tasks share.
CHECKER = Checker()
atexit.register(CHECKER.close)
