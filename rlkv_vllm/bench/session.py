"""Engines, servers and writers of rollouts that take turns, from the parent's side.

The parent alternates the turns of several child processes, so that a machine whose speed drifts
treats all variants alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.case import Kind, Point
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.cases.rollouts import Writer
from rlkv_vllm.bench.engine import Engine, EngineSpec, probe_device
from rlkv_vllm.bench.server import Server
from rlkv_vllm.child import Child
from rlkv_vllm.engine.launch import start
from rlkv_vllm.planning.roofline import Device


@dataclass(frozen=True)
class Session:
    """One that takes turns, running."""

    started: dict[str, float]  # figures of its start
    ask: Callable[[tuple[Any, ...]], Any]  # name of a method of `Turns` and its arguments
    close: Callable[[], None]


class Turns:
    """Measures one point of a case after another."""

    def __init__(self, engine: Engine | Server | Writer) -> None:
        self._engine = engine

    def __call__(self, question: tuple[Any, ...]) -> Any:
        name, *given = question
        return getattr(self, name)(*given)

    def probe(self, dtype_bytes: int) -> Device:
        return probe_device(dtype_bytes)

    def prepare(self, case: str, point: Point) -> None:
        self._case, self._point = CASES[case](), point
        self._state = self._case.prepare(self._engine, point)

    def turn(self) -> dict[str, float]:
        return self._case.turn(self._engine, self._point, self._state)

    def finish(self) -> None:
        if isinstance(self._engine, Engine):
            self._engine.drain()
        self._state = None


def _start_child(set_up: Callable[..., Any], spec: EngineSpec, log: Path) -> Session:
    child = Child(
        f"the {spec.variant} engine",
        set_up,
        spec,
        time.time(),
        # The cases look into the scheduler, so the core must run in the same process.
        environment=spec.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        log=log,
        advice="a smaller --memory or --max-model-len may help",
    )
    return Session(child.started, child.ask, child.close)


def _start_server(spec: EngineSpec, log: Path) -> Session:
    began = time.monotonic()
    server = Server(spec, log)
    return Session({"process_seconds": time.monotonic() - began}, Turns(server), server.close)


def _set_up_engine(spec: EngineSpec, began: float) -> tuple[dict[str, float], Turns]:
    """In its process; `began` is when that was started."""
    before = time.perf_counter()
    llm = start(spec.model, spec.split, **spec.options)
    engine_seconds = time.perf_counter() - before
    engine = Engine(llm)
    engine.generate([[5, 6, 7]], 1)
    process_seconds = time.time() - began
    engine.fill_cache()
    started = {
        "engine_seconds": engine_seconds,
        "process_seconds": process_seconds,
        "num_blocks": engine.num_blocks,
        "block_size": engine.config.cache_config.block_size,
    }
    return started, Turns(engine)


def _set_up_writer(spec: EngineSpec, began: float) -> tuple[dict[str, float], Turns]:
    writer = Writer(spec)
    return {"process_seconds": time.time() - began}, Turns(writer)


#: How each starts: with its options, and a file for what it prints, kept only if it fails. Raises
#: `RlkvError` if it does not start, or its cache is not split.
START: dict[Kind, Callable[[EngineSpec, Path], Session]] = {
    "engine": partial(_start_child, _set_up_engine),
    "server": _start_server,
    "rollouts": partial(_start_child, _set_up_writer),
}
