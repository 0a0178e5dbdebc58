"""What metrics and endpoint cost a running server: throughput, CPU time, time of a step.

    python benchmarks/monitoring_overhead.py

Starts `rlkv serve` with the embedded reasoner and loads it with the same questions again
and again. Between the rounds of a cycle only the scraping changes, and the order of the
cycle turns, so that a machine whose speed drifts is unfair to none:

    none    nobody looks
    ours    the split's own routes and metrics, in turn: GET /v1/rlkv, and GET /metrics
            restricted to the metrics of the split
    vllm    GET /metrics restricted to vLLM's own metrics
    all     GET /v1/rlkv and the whole of /metrics, in turn

CPU time is that of all processes of the server, so it also sees what two cores hide.
Then an engine in this process tells what the counts add to the statistics of a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import psutil

VARIANTS = ("none", "ours", "vllm", "all")
START_TIMEOUT_S = 600


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=50, help="scrapes per second")
    parser.add_argument("--rounds", type=int, default=12, help="of each variant")
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--at-once", type=int, default=16, help="requests in flight")
    parser.add_argument("--steps", type=int, default=2000, help="calls of the timed statistics")
    parser.add_argument("--port", type=int, help="of a running `rlkv serve` (embedded, no key)")
    parser.add_argument("--part", choices=("server", "step"), help="one part only")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


class Server:
    """A server of its own, or the one that listens on `port`."""

    def __init__(self, port: int | None) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        if port is not None:
            self.url = f"http://127.0.0.1:{port}"
            listening = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN")
            self.pid = next(c.pid for c in listening if c.laddr.port == port)
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "rlkv_vllm", "serve", "--host", "127.0.0.1"]
        # Every round must compute the same: no prefix cache, no log lines of requests.
        flags = ["--port", str(port), "--no-enable-prefix-caching", "--uvicorn-log-level", "error"]
        self.process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
        self.pid = self.process.pid

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            is_gone = self.process is not None and self.process.poll() is not None
            if is_gone or time.monotonic() > deadline:
                sys.exit("the server did not start")
            time.sleep(0.5)
        root = psutil.Process(self.pid)
        self.processes = [root, *root.children(recursive=True)]

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.HTTPError:
            return False

    def cpu(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return sum(t.user + t.system for t in times)

    def paths(self, variant: str) -> list[str]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        names = sorted({line.split("{")[0].split(" ")[0] for line in lines if line[0] != "#"})

        def metrics(prefix: str) -> str:
            return "/metrics?" + "&".join(f"name[]={n}" for n in names if n.startswith(prefix))

        return {
            "none": [],
            "ours": ["/v1/rlkv", metrics("rlkv:")],
            "vllm": [metrics("vllm:")],
            "all": ["/v1/rlkv", "/metrics"],
        }[variant]


def questions(count: int) -> list[str]:
    from rlkv_vllm.testbed.problems import FAMILIES, make_problems

    each = -(-count // len(FAMILIES))
    return [p.prompt for f in FAMILIES for p in make_problems(f, each, seed=1)][:count]


async def load(client: httpx.AsyncClient, server: Server, prompts: list[str], at_once: int) -> int:
    gate = asyncio.Semaphore(at_once)

    async def ask(prompt: str) -> int:
        async with gate:
            reply = await client.post(
                f"{server.url}/v1/chat/completions",
                json={
                    "model": "embedded",
                    "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0,
                },
            )
        tokens: int = reply.raise_for_status().json()["usage"]["completion_tokens"]
        return tokens

    return sum(await asyncio.gather(*map(ask, prompts)))


async def scrape(
    client: httpx.AsyncClient, server: Server, paths: list[str], rate: float, count: list[int]
) -> None:
    start = time.perf_counter()
    while True:
        path = paths[count[0] % len(paths)]
        (await client.get(server.url + path)).raise_for_status()
        count[0] += 1
        await asyncio.sleep(max(0.0, start + count[0] / rate - time.perf_counter()))


async def measure(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    prompts = questions(args.questions)
    paths = {variant: server.paths(variant) for variant in VARIANTS}
    speed, cpu, rates = defaultdict(list), defaultdict(list), defaultdict(list)
    async with httpx.AsyncClient(timeout=300) as client, httpx.AsyncClient(timeout=300) as looker:
        await load(client, server, prompts, args.at_once)
        for turn in range(args.rounds):
            shift = turn % len(VARIANTS)
            for variant in VARIANTS[shift:] + VARIANTS[:shift]:
                count = [0]
                looking = (
                    asyncio.create_task(scrape(looker, server, paths[variant], args.rate, count))
                    if paths[variant]
                    else None
                )
                used, start = server.cpu(), time.perf_counter()
                tokens = await load(client, server, prompts, args.at_once)
                seconds = time.perf_counter() - start
                cpu[variant].append(1e6 * (server.cpu() - used) / tokens)
                speed[variant].append(tokens / seconds)
                rates[variant].append(count[0] / seconds)
                if looking:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)
        per_scrape = {}
        for name, path in {
            "/v1/rlkv": "/v1/rlkv",
            "/v1/rlkv/forecast": "/v1/rlkv/forecast",
            "/metrics, ours": paths["ours"][1],
            "/metrics, vLLM's": paths["vllm"][0],
            "/metrics": "/metrics",
        }.items():
            used = server.cpu()
            for _ in range(500):
                (await looker.get(server.url + path)).raise_for_status()
            per_scrape[name] = 1e3 * (server.cpu() - used) / 500
    return {
        "tokens_per_second": {v: statistics.median(speed[v]) for v in VARIANTS},
        "speed_over_none": {
            v: statistics.median(a / b for a, b in zip(speed[v], speed["none"], strict=True))
            for v in VARIANTS
        },
        "cpu_us_per_token": {v: statistics.median(cpu[v]) for v in VARIANTS},
        "scrapes_per_second": {v: statistics.median(rates[v]) for v in VARIANTS},
        "cpu_ms_per_scrape": per_scrape,
    }


def time_of_a_step(args: argparse.Namespace) -> dict[str, float]:
    """What counting, sending and exporting add to a step, 32 requests running (microseconds)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import msgspec
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs

    from rlkv_vllm import testbed
    from rlkv_vllm.engine.config import split_plan
    from rlkv_vllm.serving.arguments import SCHEDULER
    from rlkv_vllm.serving.metrics import RlkvStatLogger
    from rlkv_vllm.serving.status import CacheFigures

    llm = LLM(
        str(testbed.model_dir()),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"rlkv": {"profile": "embedded"}},
        scheduler_cls=SCHEDULER,
        disable_log_stats=False,
    )
    core = llm.llm_engine
    for n, prompt in enumerate(questions(32)):
        core.add_request(str(n), prompt, SamplingParams(max_tokens=400, ignore_eos=True))
    durations = []
    for _ in range(40):
        start = time.perf_counter()
        core.step()
        durations.append(time.perf_counter() - start)
    scheduler = core.engine_core.engine_core.scheduler
    num_blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    figures = CacheFigures(split_plan(core.vllm_config), num_blocks)
    stat_logger = RlkvStatLogger(core.vllm_config, [0])
    stat_logger.show_split(figures)
    decoder = msgspec.msgpack.Decoder(EngineCoreOutputs)

    def base() -> None:
        stats = Scheduler.make_stats(scheduler)
        decoder.decode(msgspec.msgpack.encode(EngineCoreOutputs(scheduler_stats=stats)))

    def ours() -> None:
        stats = scheduler.make_stats()
        wire = msgspec.msgpack.encode(EngineCoreOutputs(scheduler_stats=stats))
        stat_logger.record(decoder.decode(wire).scheduler_stats, None)

    times = {}
    for name, function in (("vllm", base), ("ours", ours)):
        blocks = []
        for _ in range(20):
            start = time.process_time()
            for _ in range(args.steps // 20):
                function()
            blocks.append((time.process_time() - start) / (args.steps // 20))
        times[name] = 1e6 * statistics.median(blocks)
    return {
        "statistics_of_vllm_us": times["vllm"],
        "added_us": times["ours"] - times["vllm"],
        "step_us": 1e6 * statistics.median(durations),
        "requests_running": len(scheduler.running),
    }


def main() -> None:
    args = parse_args()
    figures: dict[str, Any] = {}
    if args.part != "step":
        server = Server(args.port)
        try:
            server.wait()
            figures |= asyncio.run(measure(args, server))
        finally:
            server.stop()
    if args.part != "server":
        figures["step"] = time_of_a_step(args)
    figures["machine"] = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load": os.getloadavg(),
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
