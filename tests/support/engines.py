"""In-process vLLM engines for tests: one at a time, shared between the tests that need the same."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

# vLLM reads these when it is imported. One process: tests look into the scheduler. One thread:
# OpenMP threads that wait for each other on a shared machine are many times slower.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rlkv_vllm.engine.launch import engine_options
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.profile.schema import HeadProfile, Provenance
from tests.support.machine import ranks_lock

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request

GREEDY_TOKENS = 100


def write_profile(
    model: Path, full_heads: Sequence[Sequence[int]], path: Path, *, sink: int, window: int
) -> Path:
    """A profile whose full heads are exactly ``full_heads`` at its recommended sparsity."""
    fingerprint = load_model_fingerprint(str(model))
    heads = range(fingerprint.num_kv_heads)
    num_full = sum(map(len, full_heads))
    profile = HeadProfile(
        model=fingerprint,
        gates=[[1.0 if h in row else 0.0 for h in heads] for row in full_heads],
        sink=sink,
        window=window,
        provenance=Provenance(method="test", created=date(2026, 11, 23)),
        recommended_sparsity=1 - num_full / (fingerprint.num_layers * fingerprint.num_kv_heads),
    )
    save_profile(profile, path)
    return path


@contextmanager
def _without_numba() -> Iterator[None]:
    """Hide the module on which an engine's start fails where an earlier one imported numba.

    vLLM looks through the attributes of all modules, and those of this one's `lib` are no dict.
    """
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden


@contextmanager
def engine(model: Path, profile: Path | None = None, **options: Any) -> Iterator[LLM]:
    """An engine that is gone, memory and process state included, when the block ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    } | options
    if profile is not None:
        options = engine_options({"profile": str(profile)}) | options  # as `rlkv serve` does
    with _without_numba():
        llm = LLM(str(model), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


class EngineCache:
    """Keeps the last engine, so that neighbouring tests with the same needs share it."""

    def __init__(self) -> None:
        self._key: object = None
        self._close: Callable[[], None] = lambda: None

    def get(self, model: Path, profile: Path | None = None, **options: Any) -> LLM:
        """The engine for these options, started unless it is the last one asked for."""
        key = (model, profile, tuple(sorted(options.items())))
        if key != self._key:
            self.close()
            context = engine(model, profile, **options)
            self._llm = context.__enter__()
            self._close = lambda: context.__exit__(None, None, None)
            self._key = key
        return self._llm

    def close(self) -> None:
        """Shut the last engine down."""
        self._close()
        self._close, self._key, self._llm = (lambda: None), None, None


def scheduler(llm: LLM) -> Scheduler:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[no-any-return]


def block_pool(llm: LLM) -> BlockPool:
    """The block pool of an in-process engine."""
    return scheduler(llm).kv_cache_manager.block_pool


def blocks_in_use(pool: BlockPool) -> int:
    """Blocks of the pool that something holds, counted one by one."""
    return sum(block.ref_cnt > 0 and not block.is_null for block in pool.blocks)


def blocks_in_tables(managers: Iterable[SingleTypeKVCacheManager]) -> int:
    """Blocks in the tables of these groups, shared ones once, counted one by one."""
    tables = (table for manager in managers for table in manager.req_to_blocks.values())
    return len({block.block_id for table in tables for block in table if not block.is_null})


def pool_is_restored(llm: LLM) -> bool:
    """Whether all blocks but the null block are free and unreferenced."""
    pool = block_pool(llm)
    return pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 and all(
        block.ref_cnt == 0 for block in pool.blocks if not block.is_null
    )


@contextmanager
def preemptions(llm: LLM) -> Iterator[list[Request]]:
    """The requests that are preempted meanwhile."""
    preempted: list[Request] = []
    preempt = scheduler(llm)._preempt_request

    def recording(request: Request, *args: Any, **kwargs: Any) -> None:
        preempted.append(request)
        preempt(request, *args, **kwargs)

    scheduler(llm)._preempt_request = recording
    try:
        yield preempted
    finally:
        del scheduler(llm)._preempt_request


@dataclass
class Steps:
    """What the scheduler did.

    Attributes:
        calls: of `schedule`.
        empty: calls that scheduled no token.
        overlapping: calls that scheduled tokens while the results of an earlier step were not
            known yet: two steps in flight.
    """

    calls: int = 0
    empty: int = 0
    overlapping: int = 0


@contextmanager
def counted_steps(llm: LLM) -> Iterator[Steps]:
    """Counts the steps of an in-process engine meanwhile."""
    steps, in_flight = Steps(), 0
    schedule, update = scheduler(llm).schedule, scheduler(llm).update_from_output

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal in_flight
        output = schedule(*args, **kwargs)
        steps.calls += 1
        is_empty = output.total_num_scheduled_tokens == 0
        steps.empty += is_empty
        steps.overlapping += not is_empty and in_flight > 0
        in_flight += not is_empty
        return output

    def counting_update(output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal in_flight
        in_flight -= output.total_num_scheduled_tokens > 0
        return update(output, *args, **kwargs)

    scheduler(llm).schedule = counting_schedule
    scheduler(llm).update_from_output = counting_update
    try:
        yield steps
    finally:
        del scheduler(llm).schedule, scheduler(llm).update_from_output


def run_script(text: str, folder: Path, given: Any, *, timeout: float) -> Any:
    """What an engine of several ranks, in processes of its own, prints behind ``RESULT``.

    Args:
        text: the script; it reads ``given`` as JSON from its standard input.
        folder: where to put it: vLLM starts its workers from a file.
        given: for the script.
        timeout: seconds.
    """
    script = folder / "engine.py"
    script.write_text(text)
    with ranks_lock():
        done = subprocess.run(
            [sys.executable, str(script)],
            input=json.dumps(given),
            env=os.environ
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def greedy(max_tokens: int = GREEDY_TOKENS) -> Any:
    """Sampling parameters of all comparisons with the oracle."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, detokenize=False
    )


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = GREEDY_TOKENS,
    **more: Any,
) -> list[RequestOutput]:
    """Greedy completions with log-probabilities."""
    inputs: Any = [{"prompt_token_ids": list(p)} for p in prompts]
    return llm.generate(inputs, greedy(max_tokens), use_tqdm=False, **more)
