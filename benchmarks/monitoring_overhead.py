"""What metrics and endpoint cost a running server: throughput, CPU time, time of a step.

    python benchmarks/monitoring_overhead.py

Starts vLLM's server with the embedded reasoner twice: `stock`, without the plugin, and `split`,
with it. Both are loaded with the same questions again and again, one at a time; between the rounds
of a cycle only the server and what is scraped from it change, and the order of the cycle turns, so
that a machine whose speed drifts is unfair to none. Every server is compared with itself while
nobody looks, so the split's own attention is in no figure.

CPU time is that of all processes of a server, so it also sees what idle cores hide. With
`--device-ms N` a step waits N ms, as for a device that computes: what scraping costs where
the engine does not need the core that answers. Then vLLM's block managers, without a model, tell
what the counts add to a step, and the registry what the metrics of the split add to a scrape.
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
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import psutil

from rlkv_vllm import models
from rlkv_vllm.engine.launch import SCHEDULER, WORKER_EXTENSION
from rlkv_vllm.models import EMBEDDED_CACHE_BYTES

START_TIMEOUT_S = 600
#: What is asked how fast answers are without anybody's metrics: the floor of any route.
FLOOR = "/version"


class Variant(NamedTuple):
    server: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.server} {self.path or 'alone'}"


VARIANTS = (
    Variant("stock"),
    Variant("stock", "/metrics"),
    Variant("split"),
    Variant("split", "/metrics"),
    Variant("split", "/v1/rlkv"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=50, help="scrapes per second")
    parser.add_argument("--rounds", type=int, default=10, help="of each variant, at most")
    parser.add_argument("--minutes", type=float, default=10, help="no round begins after them")
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--at-once", type=int, default=16, help="requests in flight")
    parser.add_argument("--device-ms", type=float, default=0, help="a step waits so long")
    parser.add_argument("--running", type=int, default=64, help="requests of the timed statistics")
    parser.add_argument("--steps", type=int, default=2000, help="calls of the timed statistics")
    parser.add_argument("--part", choices=("server", "step"), help="one part only")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


class Server:
    """VLLM's server with the embedded reasoner; the same flags with and without the split."""

    def __init__(self, name: str, device_ms: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        flags = {
            "--model": models.model_dir(),
            "--served-model-name": models.MODEL_NAME,
            "--dtype": "float32",
            "--kv-cache-memory-bytes": EMBEDDED_CACHE_BYTES,
            "--uvicorn-log-level": "error",  # no log lines of requests
            "--host": "127.0.0.1",
            "--port": self.port,
        }
        # Every round must compute the same: no prefix cache.
        switches = ["--enforce-eager", "--no-enable-prefix-caching", "--no-async-scheduling"]
        if name == "split":
            flags["--additional-config"] = json.dumps({"rlkv": {"profile": "embedded"}})
            flags["--worker-extension-cls"] = WORKER_EXTENSION
            flags["--scheduler-cls"] = SCHEDULER
        if device_ms:
            flags["--scheduler-cls"] = f"device_step.{name.capitalize()}Device"
        words = [str(word) for flag in flags.items() for word in flag]
        module = "vllm.entrypoints.launchers.api_server.entry"
        here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *switches, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"VLLM_PLUGINS": "rlkv" if name == "split" else "", "PYTHONPATH": here}
            | {"RLKV_DEVICE_MS": str(device_ms), "VLLM_LOGGING_LEVEL": "ERROR"},
        )

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start")
            time.sleep(0.5)
        root = psutil.Process(self.process.pid)
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
    from rlkv_vllm.tasks.puzzles import FAMILIES, make_problems

    each = -(-count // len(FAMILIES))
    return [p.prompt for f in FAMILIES for p in make_problems(f, each, seed=1)][:count]


async def load(client: httpx.AsyncClient, server: Server, prompts: list[str], at_once: int) -> int:
    gate = asyncio.Semaphore(at_once)

    async def ask(prompt: str) -> int:
        async with gate:
            reply = await client.post(
                f"{server.url}/v1/chat/completions",
                json={
                    "model": models.MODEL_NAME,
                    "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0,
                },
            )
        tokens: int = reply.raise_for_status().json()["usage"]["completion_tokens"]
        return tokens

    return sum(await asyncio.gather(*map(ask, prompts)))


async def looks(server: Server, path: str, rate: float, count: list[int]) -> None:
    """Scrape until cancelled, or `count[1]` times; a client that costs next to nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    start = time.perf_counter()
    try:
        while count[0] != count[1]:
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not answer.startswith(b"http/1.1 200"):
                sys.exit(f"{path}: {answer.decode()}")
            length = answer.split(b"content-length: ")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
            count[0] += 1
            await asyncio.sleep(max(0.0, start + count[0] / rate - time.perf_counter()))
    finally:
        writer.close()


async def measure(args: argparse.Namespace, servers: dict[str, Server]) -> dict[str, Any]:
    prompts = questions(args.questions)
    speed, cpu, rates = defaultdict(list), defaultdict(list), defaultdict(list)
    async with httpx.AsyncClient(timeout=300) as client:
        for server in servers.values():
            await load(client, server, prompts, args.at_once)
        per_scrape = {}
        for name, path in (
            *(("stock", FLOOR), ("split", FLOOR), ("stock", "/metrics"), ("split", "/metrics")),
            *(("split", "/v1/rlkv"), ("split", "/v1/rlkv/forecast")),
        ):
            used, count = servers[name].cpu(), [0, 1000]
            await looks(servers[name], path, 1e9, count)
            per_scrape[f"{name} {path}"] = 1e3 * (servers[name].cpu() - used) / count[0]
        end = time.monotonic() + 60 * args.minutes
        for turn in range(args.rounds):
            if time.monotonic() > end:
                break
            shift = turn % len(VARIANTS)
            for variant in VARIANTS[shift:] + VARIANTS[:shift]:
                server, count = servers[variant.server], [0, -1]
                looking = variant.path and asyncio.create_task(
                    looks(server, variant.path, args.rate, count)
                )
                used, start = server.cpu(), time.perf_counter()
                tokens = await load(client, server, prompts, args.at_once)
                seconds = time.perf_counter() - start
                cpu[variant].append(1e6 * (server.cpu() - used) / tokens)
                speed[variant].append(tokens / seconds)
                rates[variant].append(count[0] / seconds)
                print(turn, variant, round(tokens / seconds), "tokens/s", file=sys.stderr)
                if looking:
                    looking.cancel()
                    with suppress(asyncio.CancelledError):
                        await looking

    def over_alone(values: dict[Variant, list[float]]) -> dict[str, list[float]]:
        """Quartiles of the rounds, each over the same server's round of the same cycle."""
        ratios = {
            str(v): [a / b for a, b in zip(values[v], values[Variant(v.server)], strict=True)]
            for v in VARIANTS
            if v.path
        }
        return {name: statistics.quantiles(each, n=4) for name, each in ratios.items()}

    def medians(values: dict[Variant, list[float]]) -> dict[str, float]:
        return {str(v): statistics.median(values[v]) for v in VARIANTS}

    return {
        "rounds": len(speed[VARIANTS[0]]),
        "tokens_per_second": medians(speed),
        "speed_over_alone_quartiles": over_alone(speed),
        "cpu_us_per_token": medians(cpu),
        "cpu_over_alone_quartiles": over_alone(cpu),
        "scrapes_per_second": medians(rates),
        "cpu_ms_per_scrape": per_scrape,
    }


def time_of_a_step(args: argparse.Namespace) -> dict[str, float]:
    """What counting, sending and exporting add to a step (microseconds of CPU time).

    vLLM's block managers hold requests of a model of 36 layers x 8 KV heads, half of them
    streaming; the same statistics without our counts are subtracted.
    """
    import msgspec
    import torch
    from prometheus_client import CollectorRegistry, generate_latest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

    from rlkv_vllm.allocation import CacheGeometry
    from rlkv_vllm.allocation.forecast import forecast_split
    from rlkv_vllm.engine.cache.ring_manager import RingManager
    from rlkv_vllm.engine.cache.scheduler import SplitScheduler
    from rlkv_vllm.engine.cache.specs import RingSpec
    from rlkv_vllm.engine.compat import attach_figures
    from rlkv_vllm.plugin import register
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
        scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: SplitScheduler),
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
    registry.register(stat_logger)
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
        servers = {name: Server(name, args.device_ms) for name in ("stock", "split")}
        try:
            for server in servers.values():
                server.wait()
            figures["server"] = {"device_ms": args.device_ms}
            figures["server"] |= asyncio.run(measure(args, servers))
        finally:
            for server in servers.values():
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
