"""Runs cases on engines that take turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlkv_vllm.bench.case import Case, Point
from rlkv_vllm.bench.record import Record, Result
from rlkv_vllm.bench.report import gain_text
from rlkv_vllm.bench.session import Session, start_engine, start_server
from rlkv_vllm.bench.target import Target
from rlkv_vllm.planning.roofline import Device

#: Memory of a process beside weights and cache.
PROCESS_BYTES = 2 * 2**30
#: For cases without a roofline.
UNKNOWN = Device("", 0, 1.0, 1.0)


@dataclass(frozen=True)
class Job:
    """A case with the model that it runs on.

    Attributes:
        case: what is measured.
        target: the model with its engines.
        points: of the case, without those too large.
    """

    case: Case
    target: Target
    points: Sequence[Point]


@dataclass
class Runner:
    """Measures the points that are not in the record.

    Attributes:
        record: of the results.
        rounds: turns of each variant at each point.
        free_bytes: memory for engines, or of the GPU.
        folder: for the logs of engines that fail.
        say: prints a line of progress.
    """

    record: Record
    rounds: int
    free_bytes: int
    folder: Path
    say: Callable[[str], None]
    _sessions: dict[tuple[str, str, bool], Session] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _left: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """Measure all points of the jobs that are not in the record."""
        todo = [
            (job, point) for job in jobs for point in job.points if not self._is_done(job, point)
        ]
        self._left = [job.case.name for job, _ in todo]
        self.say(
            f"{len(todo)} points to measure, {sum(len(job.points) for job in jobs) - len(todo)} "
            "already measured"
        )
        try:
            for job in jobs:
                points = [point for other, point in todo if other is job]
                if not points:
                    continue
                if job.case.starts_engines:
                    self._close_all()
                    self._run_startup(job, points)
                    continue
                alone = len(job.case.variants) * self._bytes(job.target) > self.free_bytes
                turns = [(v,) for v in job.case.variants] if alone else [job.case.variants]
                for variants in turns:
                    self._run_job(job, points, variants)
        finally:
            self._close_all()

    def _is_done(self, job: Job, point: Point) -> bool:
        known = self.record.find(job.case.name, job.target.key, point)
        return known is not None and all(
            len(known["samples"].get(variant, ())) >= self.rounds for variant in job.case.variants
        )

    @staticmethod
    def _bytes(target: Target) -> int:
        return target.setup.memory_bytes + target.setup.model.resident_bytes + PROCESS_BYTES

    # ---- engines

    def _engines(
        self, target: Target, variants: Sequence[str], as_servers: bool
    ) -> dict[str, Session]:
        """Running engines, or servers, of exactly these variants."""
        keys = {variant: (target.key, variant, as_servers) for variant in variants}
        for key in self._sessions.keys() - set(keys.values()):
            self._sessions.pop(key).close()
        for variant, key in keys.items():
            if key not in self._sessions:
                self._sessions[key] = self._start(target, variant, as_servers)
        return {variant: self._sessions[key] for variant, key in keys.items()}

    def _start(self, target: Target, variant: str, as_server: bool = False) -> Session:
        began = time.monotonic()
        start_one = start_server if as_server else start_engine
        session = start_one(target.specs[variant], self.folder / f"{variant}.log")
        what = "server" if as_server else "engine"
        self.say(f"{target.name}: {variant} {what} started in {time.monotonic() - began:.0f} s")
        return session

    def _close_all(self) -> None:
        while self._sessions:
            self._sessions.popitem()[1].close()

    def _device(self, job: Job, session: Session) -> Device:
        device = self.record.device(job.target.key)
        if device is None and not job.case.runs_servers:
            device = session.ask(("probe", job.target.setup.model.dtype_bytes))
            self.record.set_device(job.target.key, device)
        return device or UNKNOWN

    # ---- points

    def _run_job(self, job: Job, points: Sequence[Point], variants: Sequence[str]) -> None:
        sessions = self._engines(job.target, variants, job.case.runs_servers)
        device = self._device(job, sessions[variants[0]])
        for point in points:
            with self._measuring(job, point, device) as result:
                for session in sessions.values():
                    session.ask(("prepare", job.case.name, point))
                self._alternate(result, variants, lambda v: sessions[v].ask(("turn",)))
                for session in sessions.values():
                    session.ask(("finish",))

    def _run_startup(self, job: Job, points: Sequence[Point]) -> None:
        def turn(variant: str) -> dict[str, float]:
            session = self._start(job.target, variant)
            session.close()
            return session.started

        device = self.record.device(job.target.key) or UNKNOWN
        for point in points:
            with self._measuring(job, point, device) as result:
                self._alternate(result, job.case.variants, turn)

    def _alternate(
        self, result: Result, variants: Sequence[str], turn: Callable[[str], dict[str, float]]
    ) -> None:
        """All rounds; their order swaps, because the first one may warm caches for the second."""
        samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for number in range(self.rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                samples[variant].append(turn(variant))
        result["samples"] |= samples
        result["alternating"] = len(variants) > 1

    @contextmanager
    def _measuring(self, job: Job, point: Point, device: Device) -> Iterator[Result]:
        """A result to fill in, then kept and reported."""
        known = self.record.find(job.case.name, job.target.key, point)
        result: Result = {
            "case": job.case.name,
            "target": job.target.key,
            "point": point,
            "samples": {} if known is None else known["samples"],
            "expected": dict(job.case.expected(job.target.setup, device, point)),
        }
        start = time.monotonic()
        yield result
        seconds = time.monotonic() - start
        self._seconds[job.case.name].append(seconds)
        self.record.add(result)
        if all(variant in result["samples"] for variant in job.case.variants):
            self._left.remove(job.case.name)
            self.say(
                f"{job.case.name} {describe_point(job.case, point)}: "
                f"{gain_text(job.case, result)} ({seconds:.0f} s){self._time_left()}"
            )

    def _time_left(self) -> str:
        if not self._left:
            return ""
        overall = statistics.fmean(s for values in self._seconds.values() for s in values)
        means = {name: statistics.fmean(values) for name, values in self._seconds.items()}
        left = sum(means.get(name, overall) for name in self._left)
        text = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        return f"; {len(self._left)} points left, about {text}"


def describe_point(case: Case, point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{label} {point[key]}" for key, label in case.columns.items())
