"""Engines in a process of their own that answer scenarios.

By default they run on the CPU with the CUDA backend under Triton's interpreter. It needs its own
process: kernels are interpreted or compiled as decided when they are imported. All that is
exchanged is the registered backend, which is told what device to plan launches for; engine,
scheduler, block managers, cache layers and metadata are those of any other engine. With
``interpret=False`` they are the engines of the machine, which tests/gpu runs on a GPU.

The program reads a JSON list of :class:`Scenario` fields and prints one JSON list of results.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """One engine and what it is asked, wave after wave.

    Attributes:
        model: its folder.
        profile: head profile; None: stock, or what ``options`` say.
        options: of ``LLM``.
        waves: prompts that run together.
        max_tokens: of every request.
        gates: set before the wave of the same index; None leaves them. In gated mode only.
    """

    model: str
    profile: str | None
    waves: list[list[list[int]]]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    gates: list[list[list[float]] | None] = field(default_factory=list)


@dataclass
class Result:
    """What an engine answered.

    Attributes:
        implementation: class that served attention.
        parts: kernel calls per layer and step.
        tokens: of every request, in the order of the prompts.
        logprobs: of these tokens.
        cached: prompt tokens of every request that were found in the prefix cache.
        preemptions: requests that lost their blocks.
        chunks: steps that prefilled a part of a prompt.
        mixed: steps with one-token requests beside longer ones.
        restored: whether all blocks were free again.
    """

    implementation: str
    parts: list[int]
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    preemptions: int = 0
    chunks: int = 0
    mixed: int = 0
    restored: bool = False


def run_scenarios(scenarios: Sequence[Scenario], *, interpret: bool = True) -> list[Result]:
    """Run the scenarios one after the other in a process.

    Args:
        interpret: replace the CPU backend by the CUDA one under Triton's interpreter.
    """
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cuda_on_cpu"],
        input=json.dumps([asdict(scenario) for scenario in scenarios]),
        env=env,
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return [Result(**result) for result in json.loads(lines[0].removeprefix("RESULT "))]


def _run(scenario: Scenario) -> Result:
    from rlkv_vllm.engine.gated.live import set_gates
    from rlkv_vllm.engine.launch import prove
    from tests.support.engines import engine, generate, pool_is_restored, scheduler

    profile = Path(scenario.profile) if scenario.profile else None
    with engine(Path(scenario.model), profile, **scenario.options) as llm:
        if profile is not None:
            prove(llm)
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        context = worker.vllm_config.compilation_config.static_forward_context
        impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        result = Result(type(impls[0]).__name__, [len(getattr(i, "_parts", ())) for i in impls])

        schedule, preempt = scheduler(llm).schedule, scheduler(llm)._preempt_request

        def counting_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            requests = scheduler(llm).requests
            lengths = list(output.num_scheduled_tokens.values())
            result.mixed += 1 in lengths and any(length > 1 for length in lengths)
            result.chunks += any(
                request.num_computed_tokens < request.num_prompt_tokens
                for request in (requests[name] for name in output.num_scheduled_tokens)
            )
            return output

        def counting_preempt(*args: Any, **kwargs: Any) -> Any:
            result.preemptions += 1
            return preempt(*args, **kwargs)

        scheduler(llm).schedule = counting_schedule
        scheduler(llm)._preempt_request = counting_preempt
        for wave, gates in itertools.zip_longest(scenario.waves, scenario.gates):
            if gates is not None:
                set_gates(llm, gates)
            for output in generate(llm, wave, scenario.max_tokens):
                (completion,) = output.outputs
                tokens = list(completion.token_ids)
                result.tokens.append(tokens)
                result.logprobs.append(
                    [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]
                )
                result.cached.append(output.num_cached_tokens or 0)
        result.restored = pool_is_restored(llm)
    return result


def _serve_cuda_backend_on_cpu() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # registers the CPU backend, once per process
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(
        AttentionBackendEnum.CPU_ATTN, "rlkv_vllm.engine.cuda.backend.SplitCUDABackend"
    )
    from rlkv_vllm.engine.cuda import metadata
    from rlkv_vllm.kernels.triton.decode import INTERPRETER

    metadata._shared_workspace = functools.partial(
        metadata._shared_workspace, target_programs=8, capability=INTERPRETER
    )


def _main() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        _serve_cuda_backend_on_cpu()
    results = [_run(Scenario(**fields)) for fields in json.loads(sys.stdin.read())]
    print("RESULT", json.dumps([asdict(result) for result in results]), flush=True)


if __name__ == "__main__":
    _main()
