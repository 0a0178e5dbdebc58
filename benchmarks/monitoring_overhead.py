"""What metrics and endpoint cost a running server: throughput, CPU time, time of a step.

    python benchmarks/monitoring_overhead.py

Starts `rlkv serve` with the embedded reasoner and loads it with the same questions again
and again. Between the rounds of a cycle only the scraping changes, and the order of the
cycle turns, so that a machine whose speed drifts is unfair to none:

    none     nobody looks
    status   GET /v1/rlkv
    metrics  GET /metrics: vLLM's own metrics and those of the split

CPU time is that of all processes of the server, so it also sees what two cores hide.
Then vLLM's block managers, without a model, tell what the counts add to a step, and the
registry what the metrics of the split add to a scrape of /metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil

VARIANTS = {"none": None, "status": "/v1/rlkv", "metrics": "/metrics"}
START_TIMEOUT_S = 600


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=50, help="scrapes per second")
    parser.add_argument("--rounds", type=int, default=12, help="of each variant")
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--at-once", type=int, default=16, help="requests in flight")
    parser.add_argument("--running", type=int, default=64, help="requests of the timed statistics")
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
    client: httpx.AsyncClient, server: Server, path: str, rate: float, count: list[int]
) -> None:
    start = time.perf_counter()
    while True:
        (await client.get(server.url + path)).raise_for_status()
        count[0] += 1
        await asyncio.sleep(max(0.0, start + count[0] / rate - time.perf_counter()))


async def measure(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    prompts = questions(args.questions)
    speed, cpu, rates = defaultdict(list), defaultdict(list), defaultdict(list)
    async with httpx.AsyncClient(timeout=300) as client, httpx.AsyncClient(timeout=300) as looker:
        await load(client, server, prompts, args.at_once)
        for turn in range(args.rounds):
            shift = turn % len(VARIANTS)
            order = list(VARIANTS)
            for variant in order[shift:] + order[:shift]:
                path, count = VARIANTS[variant], [0]
                looking = path and asyncio.create_task(
                    scrape(looker, server, path, args.rate, count)
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
        for path in ("/v1/rlkv", "/v1/rlkv/forecast", "/metrics"):
            used = server.cpu()
            for _ in range(500):
                (await looker.get(server.url + path)).raise_for_status()
            per_scrape[path] = 1e3 * (server.cpu() - used) / 500
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
    """What counting, sending and exporting add to a step (microseconds of CPU time).

    vLLM's block managers hold requests of a model of 36 layers x 8 KV heads, half of them
    streaming; the same statistics without our counts are subtracted.
    """
    import msgspec
    import torch
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

    from rlkv_vllm.allocation import CacheGeometry
    from rlkv_vllm.allocation.forecast import forecast_split
    from rlkv_vllm.engine.compat import attach_figures
    from rlkv_vllm.engine.ring_manager import RingManager
    from rlkv_vllm.engine.scheduler import SplitScheduler
    from rlkv_vllm.engine.specs import RingSpec
    from rlkv_vllm.plugin import register
    from rlkv_vllm.serving.arguments import SCHEDULER
    from rlkv_vllm.serving.metrics import RlkvStatLogger
    from rlkv_vllm.serving.status import CacheFigures

    register()
    block, sink, window, num_blocks = 16, 16, 64, 20_000
    rng = random.Random(0)
    gates = [[rng.random() for _ in range(8)] for _ in range(36)]
    geometry = CacheGeometry(36, 8, 128, 2, block, sink, window)
    forecast = forecast_split(gates, 0.5, geometry)
    rings = forecast.groups.num_ring_groups
    shape = {"block_size": block, "num_kv_heads": 1, "head_size": 128, "dtype": torch.bfloat16}
    ring = RingSpec(**shape, sliding_window=window, sink=sink, num_groups=rings + 1)
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    groups += [KVCacheGroupSpec([f"ring{n}"], ring) for n in range(rings)]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=32768,
        scheduler_block_size=block,
        hash_block_size=block,
        max_in_flight_tokens=4096,
        enable_caching=False,
    )
    for n in range(args.running):
        request = Request(str(n), list(range(2000)), SamplingParams(max_tokens=10), None)
        manager.new_step_starts()
        if manager.allocate_slots(request, 2000) is None:
            sys.exit(f"--running {args.running}: does not fit")

    class Counting(SplitScheduler):
        def __init__(self) -> None:  # vLLM's needs a whole engine
            self.kv_cache_manager, self.block_size = manager, block
            managers = manager.coordinator.single_type_managers
            self._rings = [m for m in managers if isinstance(m, RingManager)]
            self._has_full_group = True
            self._evicted = self._hit = 0

    plan = SimpleNamespace(
        forecast=forecast,
        groups=forecast.groups,
        geometry=geometry,
        profile=SimpleNamespace(sha256=lambda: ""),
        profile_id="p",
        sparsity=0.5,
        max_model_len=32768,
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="m"),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
    )
    stat_logger = RlkvStatLogger(config, [0])
    stat_logger.show_split(CacheFigures(plan, num_blocks))
    scheduler = Counting()
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(EngineCoreOutputs)

    def send(stats: SchedulerStats) -> SchedulerStats:
        wire = encoder.encode(EngineCoreOutputs(scheduler_stats=stats))
        return decoder.decode(wire).scheduler_stats

    def without() -> None:
        send(SchedulerStats(num_running_reqs=args.running))

    def ours() -> None:
        stats = SchedulerStats(num_running_reqs=args.running)
        attach_figures(stats, scheduler._block_use(stats)._asdict())
        stat_logger.record(send(stats), None)

    def exported() -> None:
        generate_latest(registry)

    registry = CollectorRegistry()
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("rlkv:"):
            registry.register(collector)
    variants = (("without", without), ("ours", ours), ("exported", exported))
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(20):
        for name, function in variants:
            start = time.process_time()
            for _ in range(args.steps // 20):
                function()
            times[name].append((time.process_time() - start) / (args.steps // 20))
    median = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return {
        "requests_running": args.running,
        "ring_groups": rings,
        "added_to_a_step_us": median["ours"] - median["without"],
        "added_to_a_scrape_us": median["exported"],
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
