"""Engines in child processes, from the parent's side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.worker import MARK, EngineSpec
from rlkv_vllm.errors import RlkvError

#: Without what would override the size of the cache.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}


class Session:
    """A running engine.

    Args:
        spec: what it is started with.
        log: file for what it says; it stays only if the engine fails.

    Attributes:
        started: what the worker says when it is ready.

    Raises:
        RlkvError: it does not start.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._path = log
        self._log = log.open("w+")
        self._failed = False
        command = [sys.executable, "-m", "rlkv_vllm.bench.worker", json.dumps(asdict(spec))]
        self._process = subprocess.Popen(
            [*command, str(time.time())],
            env=ENVIRONMENT | spec.environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.started = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Raises:
            RlkvError: the engine died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        if not self._failed:
            self._path.unlink(missing_ok=True)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                values: dict[str, Any] = json.loads(line.removeprefix(MARK))
                if "error" in values:
                    raise RlkvError(values["error"])
                return values
        raise self._died()

    def _died(self) -> RlkvError:
        status = self._process.wait()
        self._failed = True
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "Error" in line]
        last = (errors or lines or ["it said nothing"])[-1]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return RlkvError(
            f"the {self.spec.variant} engine {how}: {last[-300:]} (all of it in {self._path}); a "
            "smaller --memory or --max-model-len may help"
        )


def has_cuda() -> bool:
    """Whether engines run on a GPU."""
    import torch

    return bool(torch.cuda.is_available())
