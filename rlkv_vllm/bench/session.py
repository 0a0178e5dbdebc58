"""Engines and servers that take turns, from the parent's side.

The parent alternates the turns of several child processes, so that a machine whose speed drifts
treats all variants alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkv_vllm.bench.case import Point
from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.bench.engine import Engine, EngineSpec, probe_device
from rlkv_vllm.bench.server import Server
from rlkv_vllm.child import Child
from rlkv_vllm.engine.launch import start
from rlkv_vllm.planning.roofline import Device


@dataclass(frozen=True)
class Session:
    """A running engine or server.

    Attributes:
        started: figures of its start.
        ask: takes the name of a method of `Turns` and its arguments, as one tuple.
        close: ends it.
    """

    started: dict[str, float]
    ask: Callable[[tuple[Any, ...]], Any]
    close: Callable[[], None]


class Turns:
    """Measures one point of a case after another on an engine or a server."""

    def __init__(self, engine: Engine | Server) -> None:
        self._engine = engine

    def __call__(self, question: tuple[Any, ...]) -> Any:
        name, *given = question
        return getattr(self, name)(*given)

    def probe(self, dtype_bytes: int) -> Device:
        """The device that the engine runs on."""
        return probe_device(dtype_bytes)

    def prepare(self, case: str, point: Point) -> None:
        """Go to another point."""
        self._case, self._point = CASES[case](), point
        self._state = self._case.prepare(self._engine, point)

    def turn(self) -> dict[str, float]:
        """Measure once."""
        return self._case.turn(self._engine, self._point, self._state)

    def finish(self) -> None:
        """Leave the point."""
        self._case.finish(self._engine, self._state)
        self._state = None


def start_engine(spec: EngineSpec, log: Path) -> Session:
    """An engine in a process of its own.

    Args:
        spec: how it is started.
        log: file for what it prints; kept only if the engine fails.

    Raises:
        RlkvError: it does not start, or its cache is not split.
    """
    child = Child(
        f"the {spec.variant} engine",
        _set_up,
        spec,
        time.time(),
        # The cases look into the scheduler, so the core must run in the same process.
        environment=spec.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        log=log,
        advice="a smaller --memory or --max-model-len may help",
    )
    return Session(child.started, child.ask, child.close)


def start_server(spec: EngineSpec, log: Path) -> Session:
    """`rlkv serve`, or vLLM's own server; arguments and errors as `start_engine`."""
    began = time.monotonic()
    server = Server(spec, log)
    return Session({"process_seconds": time.monotonic() - began}, Turns(server), server.close)


def _set_up(spec: EngineSpec, began: float) -> tuple[dict[str, float], Turns]:
    """Start the engine, in its process; `began` is when that process was started."""
    before = time.perf_counter()
    llm = start(spec.model, spec.split, **spec.options)
    engine_seconds = time.perf_counter() - before
    engine = Engine(llm, llm.llm_engine.model_config.get_vocab_size(), spec.variant)
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
