"""Readable output of ``rlkv serve``: phases of the start, warnings, requests.

:file:`logging.json` applies these classes in the server and in every process of the engine. With
``VLLM_LOGGING_LEVEL=INFO`` vLLM's own log is shown instead.
"""

from __future__ import annotations

import atexit
import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

_LOGGING_CONFIG = Path(__file__).with_name("logging.json")

#: The split cache's own messages are always shown.
_OWN_LOGGER = "vllm.rlkv"

#: Start of vLLM's message -> name of the phase. Where vLLM rewords a message, its phase is not
#: shown; nothing else changes.
_PHASES = (
    ("Starting to load model", "loading weights"),
    ("Warming up model", "warming up (compiles the model, this can take minutes)"),
    ("Application startup complete", "ready; Ctrl-C stops the server"),
    ("[shutdown] API server: shutdown triggered", "stopping"),
)

#: Warnings that need no action: vLLM's own choices, logged once per process.
_NOISE = (
    "Attempted to load weight",  # --dtype differs from the checkpoint's
    "CPU backend prefers block_size",  # rings want small blocks
    "Enforce eager set",
    "Failed to create oneDNN linear",
    "Found ulimit of",
    "Inductor compilation was disabled",
    "Model Runner V2 requires Triton",
    "Reset SSM cache type",  # of a kind of layer that no split model has
    "Using custom scheduler class",  # ours, made for this version of vLLM
    "Triton is",  # not installed, or without a CPU backend
    "doesn't allow to use `torch.set_num_threads`",
    "is not found in LD_PRELOAD",
)

#: The same for messages that do not come through Python's logging.
_QUIET_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

_LEVEL_VARIABLES = ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING")
_LEVEL_FLAGS = (
    "--log-level",
    "--log-config-file",
    "--logging-config",
    "--disable-access-log-for-endpoints",
)


class StartUpFilter(logging.Filter):
    """Lets phases, warnings and the split cache's own messages through."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print `record`; a phase is renamed on the way."""
        if record.name == _OWN_LOGGER:
            return True
        message = record.getMessage()
        for start, phase in _PHASES:
            if message.startswith(start):
                record.msg, record.args = phase, None
                return True
        return record.levelno >= logging.WARNING and not any(noise in message for noise in _NOISE)


class PollFilter(logging.Filter):
    """Leaves out answered requests of programs that poll."""

    _POLLED = ("/health", "/metrics", "/v1/rlkv", "/v1/rlkv/gates")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print `record`, a line of uvicorn's access log."""
        match record.args:
            case (_, "GET", str(path), _, HTTPStatus.OK):
                return path.split("?")[0] not in self._POLLED
        return True


class LineFormatter(logging.Formatter):
    """``rlkv 12:34:56 message``, with the level if it is above INFO."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One record as text."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"rlkv {self.formatTime(record, self.datefmt)} {level}{record.message}"

    def formatException(self, ei: Any) -> str:
        """The last line, which names the error; vLLM's own log has the rest."""
        return super().formatException(ei).rstrip().rsplit("\n", 1)[-1]

    def usesTime(self) -> bool:
        """The time is added by :meth:`formatMessage`."""
        return False


def say(message: str, *, must: bool = False) -> None:
    """Print one line of progress, as :class:`LineFormatter` does.

    A line that cannot be written is lost, as log lines are: a full disk must not stop the server.
    With `must` the OSError is raised.
    """
    with nullcontext() if must else suppress(OSError):
        print(f"rlkv {time.strftime('%H:%M:%S')} {message}", flush=True)


def quiet_logging(arguments: Sequence[str]) -> None:
    """Make vLLM log through the classes above, unless the user configured logging.

    The environment variable is for the engine's processes. In this one vLLM reads it only after
    its import, so the configuration is applied now as well.
    """
    flags = [argument.replace("_", "-") for argument in arguments if argument.startswith("--")]
    if any(flag.startswith(_LEVEL_FLAGS) for flag in flags):
        return
    given = {variable for variable in _LEVEL_VARIABLES if variable in os.environ}
    if given and not is_quiet():  # this process may have inherited our own configuration
        return
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(_LOGGING_CONFIG)
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.config.dictConfig(json.loads(_LOGGING_CONFIG.read_text(encoding="utf-8")))


def is_quiet() -> bool:
    """Whether :func:`quiet_logging` chose the logging, here or in the process that started this."""
    return os.environ.get("VLLM_LOGGING_CONFIG_PATH") == str(_LOGGING_CONFIG)


def silence_exit() -> None:
    """Drop the output of libraries while the interpreter ends, and output that cannot be written.

    nanobind prints 30 lines about objects that triton never frees. And Python exits with status
    120 if it cannot flush its output, e.g. to a full disk.
    """

    def silence() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(null, 1)
        if is_quiet():
            with suppress(OSError):
                sys.stderr.flush()
            os.dup2(null, 2)

    atexit.register(silence)
