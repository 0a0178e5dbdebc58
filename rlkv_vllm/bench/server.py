"""A server in a child process, loaded by vLLM's own client (`vllm bench serve`)."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.session import ENVIRONMENT
from rlkv_vllm.bench.worker import EngineSpec
from rlkv_vllm.errors import RlkvError

_NAME = "bench"
_START_SECONDS = 900


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection will be given."""
    while True:
        port = random.SystemRandom().randrange(16_384, 32_768)  # below the ephemeral ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServerSession:
    """`rlkv serve`, or vLLM's own server.

    Args:
        spec: what its engine is started with.
        log: file for what it says; it stays only if the server fails.

    Raises:
        RlkvError: it does not start.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._path = log
        self._log = log.open("w+")
        self._failed = False
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME]
        for option, value in spec.options.items():
            flag = "--" + option.replace("_", "-")
            flags += [flag] if value is True else [] if value is False else [flag, str(value)]
        command = [sys.executable, "-m"]
        if spec.split is None:
            command += ["vllm.entrypoints.openai.api_server", "--model", spec.model]
        else:
            command += ["rlkv_vllm", "serve", spec.model]
            for option, value in spec.split.items():
                command += ["--" + option, str(value)]
        environment = spec.environment()
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as users serve it
        self._process = subprocess.Popen(
            [*command, *flags],
            env=ENVIRONMENT | environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        start = time.monotonic()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.started = {"process_seconds": time.monotonic() - start}
        self._point: dict[str, Any] = {}

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Take the same orders as `Session`: prepare, turn, finish."""
        if do == "prepare":
            self._point = values["point"]
            self._load(self._point | {"requests": 2})
        elif do == "turn":
            found = self._load(self._point)
            if found["failed"]:
                raise RlkvError(
                    f"the {self.spec.variant} server failed {found['failed']} requests: "
                    f"{next((e for e in found['errors'] if e), 'no reason given')[:200]}"
                )
            return {
                "ttft_ms": found["median_ttft_ms"],
                "tpot_ms": found["median_tpot_ms"],
                "p99_tpot_ms": found["p99_tpot_ms"],
                "tokens_per_s": found["output_throughput"],
            }
        return {}

    def close(self) -> None:
        """End the server and its engine."""
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if not self._failed:
            self._path.unlink(missing_ok=True)

    def _load(self, point: dict[str, Any]) -> dict[str, Any]:
        """Run vLLM's client once."""
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        args = parser.parse_args(
            [
                *("--backend", "openai", "--base-url", self._url),
                *("--model", _NAME, "--tokenizer", self.spec.model),
                *("--dataset-name", "random", "--seed", "3"),
                *("--random-input-len", str(point["prompt"])),
                *("--random-output-len", str(point["output"])),
                *("--num-prompts", str(point["requests"])),
                *("--request-rate", str(point["rate"])),
                *("--ignore-eos", "--disable-tqdm"),
            ]
        )
        with redirect_stdout(self._log), redirect_stderr(self._log):
            found: dict[str, Any] = asyncio.run(main_async(args))
        return found

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self._failed = True
        self._log.flush()
        lines = [line for line in self._path.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line]
        last = (errors or lines or ["it said nothing"])[-1]
        raise RlkvError(
            f"the {self.spec.variant} server did not start: {last[-300:]} (all of it in "
            f"{self._path})"
        )
