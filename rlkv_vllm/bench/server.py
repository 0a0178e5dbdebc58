"""A server in a child process, loaded by vLLM's own client (`vllm bench serve`)."""

from __future__ import annotations

import asyncio
import http.client
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.engine import EngineSpec
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.machine import cpu_seconds

_HOST, _NAME = "127.0.0.1", "bench"
_START_SECONDS = 900


def free_port() -> int:
    """A port of 127.0.0.1 without a listener, which no outgoing connection will be given."""
    while True:
        port = random.SystemRandom().randrange(16_384, 32_768)  # below the ephemeral ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_HOST, port))
            return port


class Server:
    """`rlkv serve`, or vLLM's own server; `log` is kept only if it does not start."""

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.variant, self._model = spec.variant, spec.model
        self._path, self._log = log, log.open("w+")
        self._failed = False
        self._port = free_port()
        flags = spec.options | {"host": _HOST, "port": self._port, "served_model_name": _NAME}
        if spec.split is None:
            command = ["vllm.entrypoints.openai.api_server", "--model", spec.model]
        else:
            command = ["rlkv_vllm", "serve", spec.model]
            flags |= {name: spec.split[name] for name in ("profile", "sparsity", "sink", "window")}
        for option, value in flags.items():
            if value is not False:
                command.append("--" + option.replace("_", "-"))
                command += [] if value is True else [str(value)]
        environment = os.environ | spec.environment()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if not self._failed:
            self._path.unlink(missing_ok=True)

    def load(
        self, *, requests: int, prompt: int, output: int, rate: float, at_once: int | None = None
    ) -> dict[str, Any]:
        """Run vLLM's client once, with the same random prompts in every call; returns its figures.

        Requests of `prompt` and `output` tokens arrive at a `rate` per second (Poisson; ``inf``:
        all at once), with at most `at_once` of them in flight.

        Raises:
            RlkvError: a request failed.
        """
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        args = parser.parse_args(
            [
                *("--backend", "openai", "--base-url", f"http://{_HOST}:{self._port}"),
                *("--model", _NAME, "--tokenizer", self._model),
                *("--dataset-name", "random", "--seed", "3"),
                *("--random-input-len", str(prompt), "--random-output-len", str(output)),
                *("--num-prompts", str(requests), "--request-rate", str(rate)),
                *(("--max-concurrency", str(at_once)) if at_once else ()),
                *("--ignore-eos", "--disable-tqdm"),
            ]
        )
        with redirect_stdout(self._log), redirect_stderr(self._log):
            found: dict[str, Any] = asyncio.run(main_async(args))
        if found["failed"]:
            reason = next((error for error in found["errors"] if error), "no reason given")
            raise RlkvError(
                f"the {self.variant} server failed {found['failed']} requests: {reason[:200]}"
            )
        return found

    def cpu_seconds(self) -> float:
        """CPU time of all processes of the server so far."""
        return cpu_seconds(self._process.pid)

    def scrape(
        self, path: str, rate: float, *, stop: threading.Event, limit: float = math.inf
    ) -> int:
        """Read a page over one connection, `rate` times a second, until `stop` or `limit` reads.

        Returns how many times it was read.

        Raises:
            RlkvError: the server does not answer with the page.
        """
        start, count = time.monotonic(), 0
        with closing(http.client.HTTPConnection(_HOST, self._port, timeout=60)) as connection:
            while count < limit:
                if stop.wait(max(0.0, start + count / rate - time.monotonic())):
                    break
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    raise RlkvError(f"the {self.variant} server: {path}: status {answer.status}")
                count += 1
        return count

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError, RlkvError):
                self.scrape("/health", math.inf, stop=threading.Event(), limit=1)
                return
            time.sleep(0.5)
        self._failed = True
        self._log.flush()
        lines = [line for line in self._path.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line]
        last = (errors or lines or ["it printed nothing"])[-1]
        raise RlkvError(
            f"the {self.variant} server did not start: {last[-300:]} (log: {self._path})"
        )
