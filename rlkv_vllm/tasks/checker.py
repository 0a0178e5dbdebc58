"""Runs the checks of other libraries in a worker process.

math-verify and the scorers of reasoning-gym compute with what a model wrote: `9^9^9^9` would
never end, or fill the memory. math-verify's own time limit is a signal, which works in the main
thread only and does not interrupt long arithmetic. A check that exceeds its limit ends the worker;
the next check starts a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rlkv_vllm.child import changed_environment
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks import worker

#: Limit of a check (seconds of CPU time: the load of the machine must not change a score).
CPU_SECONDS = 5.0

#: Of the worker: Python reads these variables when it starts.
_ENVIRONMENT = {
    # Some of reasoning-gym's generators iterate over sets of words.
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Checker:
    """A worker process that checks answers, one at a time; thread-safe."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._inherited: list[ProcessPoolExecutor | None] = []
        self._worker_pid = 0
        self._owner = 0

    def score(self, request: dict[str, Any]) -> float:
        """The score of an answer, 0 if the check fails or exceeds its limit; errors as `ask`."""
        reply = self.ask(request, self._cpu_seconds)
        return 0.0 if reply is None else float(reply["score"])

    def ask(self, request: dict[str, Any], cpu_seconds: float = 0) -> dict[str, Any] | None:
        """The reply of `worker.reply`; None if the worker ran out of time or memory.

        An `RlkvError` if the worker cannot be started or refuses the request.
        """
        with self._lock:
            pool = self._running()
            try:
                reply = pool.submit(worker.reply, request, cpu_seconds).result()
            except BrokenProcessPool:
                self._stop()
                return None
            except BaseException:  # Ctrl-C: the check may still be running
                self._stop()
                raise
        if "error" in reply:
            raise RlkvError(one_line(reply["error"], 400))
        return reply

    def close(self) -> None:
        """End the worker; the next request starts a new one."""
        with self._lock:
            if self._owner == os.getpid():
                self._stop()

    def _running(self) -> ProcessPoolExecutor:
        if self._owner != os.getpid():
            # After a fork the pool belongs to the parent. Kept, as its finalizer would wake it.
            self._inherited.append(self._pool)
            self._pool, self._owner = None, os.getpid()
        if self._pool is not None:
            if any(child.pid == self._worker_pid for child in multiprocessing.active_children()):
                return self._pool
            self._stop()
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=worker.prepare
        )
        try:
            with changed_environment(_ENVIRONMENT):
                started = self._pool.submit(os.getpid)
            self._worker_pid = started.result()
        except (OSError, BrokenProcessPool) as error:
            self._stop()
            raise RlkvError(
                f"the process that checks answers cannot be started ({one_line(error)}): free "
                "memory, or install 'rlkv-vllm[train]' again; the process may have printed why"
            ) from error
        except BaseException:
            self._stop()
            raise
        return self._pool

    def _stop(self) -> None:
        if self._worker_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker_pid, signal.SIGKILL)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._worker_pid = None, 0


#: Shared by all tasks.
CHECKER = Checker()
atexit.register(CHECKER.close)
