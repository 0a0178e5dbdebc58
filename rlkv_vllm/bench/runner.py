"""Runs cases on engines that take turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlkv_vllm.bench.case import Case, Kind, Point
from rlkv_vllm.bench.record import Record, Result
from rlkv_vllm.bench.report import gain_text
from rlkv_vllm.bench.session import START, Session
from rlkv_vllm.bench.target import Target
from rlkv_vllm.planning.roofline import Device

#: Memory of a process beside weights and cache.
PROCESS_BYTES = 2 * 2**30
#: For cases without a roofline.
UNKNOWN = Device("", 0, 1.0, 1.0)


@dataclass(frozen=True)
class Job:
    """A case with the model that it runs on, and its points that fit."""

    case: Case
    target: Target
    points: Sequence[Point]


@dataclass
class Runner:
    """Measures the points that are not in the record."""

    record: Record
    rounds: int  # turns of each variant at each point
    free_bytes: int  # memory for engines, or of the GPU
    folder: Path  # for the logs of engines that fail
    say: Callable[[str], None]
    _sessions: dict[tuple[str, str, Kind], Session] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _left: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """Measure all points of the jobs that are not in the record."""
        todo = [[point for point in job.points if not self._is_done(job, point)] for job in jobs]
        self._left = [job.case.name for job, points in zip(jobs, todo, strict=True) for _ in points]
        self.say(
            f"{len(self._left)} points to measure, "
            f"{sum(len(job.points) for job in jobs) - len(self._left)} already measured"
        )
        try:
            for job, points in zip(jobs, todo, strict=True):
                setup, variants = job.target.setup, job.case.variants
                # Who writes rollouts takes float32 on a CPU where the user names no type.
                weights = setup.model.resident_bytes * (2 if job.case.runs == "rollouts" else 1)
                each = setup.memory_bytes + weights + PROCESS_BYTES
                fit = job.case.starts_engines or len(variants) * each <= self.free_bytes
                for together in [variants] if fit else [(variant,) for variant in variants]:
                    if points:
                        self._run_job(job, points, together)
        finally:
            self._engines([])

    def _is_done(self, job: Job, point: Point) -> bool:
        known = self.record.find(job.case.name, job.target.key, point)
        return known is not None and all(
            len(known["samples"].get(variant, ())) >= self.rounds for variant in job.case.variants
        )

    def _run_job(self, job: Job, points: Sequence[Point], variants: Sequence[str]) -> None:
        """Measure points; engines that are needed start, and others end."""
        case, target = job.case, job.target
        running = () if case.starts_engines else variants
        found = self._engines([(target, variant, case.runs) for variant in running])
        sessions = dict(zip(running, found, strict=True))

        def turn(variant: str) -> dict[str, float]:
            if variant in sessions:
                figures: dict[str, float] = sessions[variant].ask(("turn",))
                return figures
            session = self._start(target, variant, case.runs)
            session.close()
            return session.started

        device = self.record.device(target.key)
        if device is None and sessions and case.runs == "engine":
            device = found[0].ask(("probe", target.setup.model.dtype_bytes))
            self.record.set_device(target.key, device)
        for point in points:
            known = self.record.find(case.name, target.key, point)
            samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
            result: Result = {
                "case": case.name,
                "target": target.key,
                "point": point,
                "samples": samples if known is None else known["samples"] | samples,
                "expected": case.expected(target.setup, device or UNKNOWN, point),
                "alternating": len(variants) > 1,
            }
            start = time.monotonic()
            for session in found:
                session.ask(("prepare", case.name, point))
            for number in range(self.rounds):
                # The order swaps, because the first one may warm caches for the second.
                for variant in variants if number % 2 == 0 else reversed(variants):
                    samples[variant].append(turn(variant))
            for session in found:
                session.ask(("finish",))
            self._keep(job, result, time.monotonic() - start)

    def _keep(self, job: Job, result: Result, seconds: float) -> None:
        name = job.case.name
        self._seconds[name].append(seconds)
        self.record.add(result)
        if all(variant in result["samples"] for variant in job.case.variants):
            self._left.remove(name)
            self.say(
                f"{name} {describe_point(job.case, result['point'])}: "
                f"{gain_text(job.case, result)} ({seconds:.0f} s){self._time_left()}"
            )

    def _engines(self, needed: Sequence[tuple[Target, str, Kind]]) -> list[Session]:
        """Running engines: exactly these."""
        keys = [(target.key, variant, kind) for target, variant, kind in needed]
        for key in self._sessions.keys() - set(keys):
            self._sessions.pop(key).close()
        for key, wanted in zip(keys, needed, strict=True):
            if key not in self._sessions:
                self._sessions[key] = self._start(*wanted)
        return [self._sessions[key] for key in keys]

    def _start(self, target: Target, variant: str, kind: Kind) -> Session:
        began = time.monotonic()
        session = START[kind](target.specs[variant], self.folder / f"{variant}.log")
        self.say(f"{target.name}: {variant} {kind} started in {time.monotonic() - began:.0f} s")
        return session

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
