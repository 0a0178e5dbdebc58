"""The process of ``rlkv serve`` that the user sees: it starts the server and passes signals on.

vLLM ignores signals while an engine is loading. So the server runs in a process of its own, in a
process group of its own: until it listens, a signal ends the whole group at once, afterwards the
signal goes to the server, which finishes its requests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from rlkv_vllm.serving.progress import say

#: Process id of the supervisor, for the server to tell it that it listens.
_SUPERVISOR = "RLKV_SUPERVISOR"
#: File descriptor whose other end the supervisor holds as long as it lives.
_LIFELINE = "RLKV_LIFELINE"
_LISTENS = signal.SIGUSR1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_supervised(command: Sequence[str]) -> int:
    """Run the server until it ends; the main thread only.

    Args:
        command: of the server's process, which calls `follow_supervisor`.

    Returns:
        Exit status: the server's, or 128 and the number of the signal that ended it.
    """
    listens = threading.Event()
    ended_by: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        if listens.is_set() and process is not None:
            process.send_signal(number)
            return
        ended_by.append(number)
        if process is not None:
            _kill_group(process.pid)

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    before[_LISTENS] = signal.signal(_LISTENS, lambda number, frame: listens.set())
    lifeline, held = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            env=os.environ | {_SUPERVISOR: str(os.getpid()), _LIFELINE: str(lifeline)},
            pass_fds=[lifeline],
            process_group=0,
        )
        if ended_by:  # between the handlers and here
            _kill_group(process.pid)
        status = process.wait()
        _kill_group(process.pid)  # an engine must not outlive its server
    finally:
        os.close(lifeline)
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended_by:
        say("stopped")
        return 128 + ended_by[0]
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    say(f"error: the server was killed by {name}: `dmesg` tells whether memory ran out")
    return 128 - status


def follow_supervisor() -> bool:
    """End the process group when the supervisor is gone.

    Returns:
        Whether this is the server's process, so that there is a supervisor.
    """
    lifeline = os.environ.pop(_LIFELINE, None)
    if lifeline is None:
        return False

    def watch() -> None:
        os.read(int(lifeline), 1)  # nothing is written: it returns at the end of the supervisor
        _kill_group(os.getpgrp())

    threading.Thread(target=watch, name="rlkv-lifeline", daemon=True).start()
    return True


def tell_supervisor() -> None:
    """In any process of the server: it listens, and from now on handles signals itself."""
    supervisor = os.environ.get(_SUPERVISOR)
    if supervisor is not None:
        with suppress(ProcessLookupError):
            os.kill(int(supervisor), _LISTENS)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
