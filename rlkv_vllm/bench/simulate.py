"""A replica without a model: vLLM's own scheduler and block managers, and a clock.

The scheduler admits, preempts and frees as in the engine, with the split's ring managers where
the cache is split. Instead of running a model, every step takes its roofline time. The plans of
`rlkv_vllm/planning/fleet.py` are tested against it.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.ring import num_blocks
from rlkv_vllm.bench.random_model import write_model
from rlkv_vllm.planning.fleet import Lengths, Replica
from rlkv_vllm.planning.roofline import ModelSize


@dataclass(frozen=True)
class Simulated:
    """A replica under simulated traffic."""

    requests_per_s: float  # completed
    tokens_per_s: float  # generated
    running: float  # mean requests at once
    step_seconds: float  # mean time of a step
    waiting: int  # requests at the end
    preemptions: int  # of all requests
    ttft_seconds: float  # median time to the first token


def simulate(
    replica: Replica,
    lengths: Lengths,
    *,
    requests_per_s: float | None = None,
    requests: int = 400,
    seed: int = 0,
) -> Simulated:
    """Let a replica complete `requests`, and count from the second half of them on.

    They arrive as a Poisson process of `requests_per_s`; None: some always wait.
    """
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    rng = random.Random(seed)
    scheduler = make_scheduler(replica, max(p + o for p, o in lengths.pairs) + 1)
    roofline, cache = replica.roofline, replica.roofline.cache
    arrived: dict[str, float] = {}
    first_token: dict[str, float] = {}
    clock = next_arrival = 0.0
    made = done = tokens = preemptions = steps = 0
    running = busy = 0.0
    counted_from: float | None = None
    typical = lengths.mean_in_flight(lambda context: context)
    at_first = min(replica.max_num_seqs, replica.num_blocks // replica.blocks(round(typical)))

    def arrive(at: float) -> None:
        nonlocal made
        prompt, output = rng.choice(lengths.pairs)
        if made < at_first:
            output = rng.randint(1, output)  # otherwise they would all end together
        name = f"r{made}"
        made += 1
        arrived[name] = at
        sampling = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False)
        scheduler.add_request(Request(name, [0] * prompt, sampling, pooling_params=None))

    while done < requests:
        if requests_per_s is None:
            while len(scheduler.waiting) < 4:
                arrive(clock)
        else:
            if not scheduler.requests:
                clock = max(clock, next_arrival)
            while next_arrival <= clock:
                arrive(next_arrival)
                next_arrival += rng.expovariate(requests_per_s)
        if counted_from is None and done >= requests // 2:
            counted_from = clock
            done_before, tokens, preemptions, steps, running, busy = done, 0, 0, 0, 0.0, 0.0
        scheduled = scheduler.schedule()
        sampled: dict[str, list[int]] = {}
        decodes = prompts = prompt_tokens = 0
        head_tokens = prompt_pairs = 0.0
        for name, count in scheduled.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            last = request.num_computed_tokens  # already that after the step
            if count == 1 and last > request.num_prompt_tokens:
                decodes += 1
                head_tokens += cache.head_tokens(last)
            else:
                prompts += 1
                prompt_tokens += count
                prompt_pairs += cache.pairs(last - count, last)
            sampled[name] = [1] if last >= request.num_tokens else []
        seconds = roofline.step_seconds(
            decodes,
            head_tokens,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            prompt_pairs=prompt_pairs,
        )
        clock += seconds
        busy += seconds
        steps += 1
        running += len(scheduler.running)
        preemptions += len(scheduled.preempted_req_ids or ())
        for name, ids in sampled.items():
            if ids:
                tokens += 1
                first_token.setdefault(name, clock)
        before = len(scheduler.requests)
        indices = {name: i for i, name in enumerate(sampled)}
        output = ModelRunnerOutput(list(sampled), indices, list(sampled.values()))
        scheduler.update_from_output(scheduled, output)
        done += before - len(scheduler.requests)
    assert counted_from is not None
    took = clock - counted_from
    return Simulated(
        requests_per_s=(done - done_before) / took,
        tokens_per_s=tokens / took,
        running=running / steps,
        step_seconds=busy / steps,
        waiting=len(scheduler.waiting),
        preemptions=preemptions,
        ttft_seconds=statistics.median(at - arrived[name] for name, at in first_token.items()),
    )


def make_scheduler(replica: Replica, max_model_len: int) -> Any:
    """The scheduler of a replica: vLLM's, or that of the split cache."""
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from rlkv_vllm.engine.cache.scheduler import SplitScheduler
    from rlkv_vllm.engine.cache.specs import RingSpec

    config = _config(max_model_len, replica.max_num_seqs)
    geometry, groups = replica.forecast.geometry, replica.forecast.groups
    block_size = geometry.block_size
    shape: Any = {
        "block_size": block_size,
        "num_kv_heads": 1,
        "head_size": geometry.head_dim,
        "dtype": torch.uint8 if geometry.dtype_bytes == 1 else torch.bfloat16,
    }
    specs: list[Any] = []
    if not replica.is_split or groups.allocation.num_full:
        specs.append(FullAttentionSpec(**shape))
    if replica.is_split:
        ring = RingSpec(
            **shape,
            sliding_window=geometry.window,
            sink=geometry.sink,
            num_groups=groups.num_ring_groups + 1,
            chunk_blocks=num_blocks(config.max_in_flight_tokens, block_size),
            steps_in_flight=config.max_concurrent_batches,
        )
        specs += [ring] * groups.num_ring_groups
    config.cache_config.num_gpu_blocks = replica.num_blocks
    return (SplitScheduler if replica.is_split else Scheduler)(
        config,
        KVCacheConfig(
            num_blocks=replica.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([f"group{i}"], spec) for i, spec in enumerate(specs)],
        ),
        StructuredOutputManager(config),
        block_size,
    )


@lru_cache(maxsize=8)
def _config(max_model_len: int, max_num_seqs: int) -> Any:
    """vLLM's configuration; of the model, the scheduler needs only the length."""
    from vllm.engine.arg_utils import EngineArgs

    from rlkv_vllm.plugin import register

    register()
    with tempfile.TemporaryDirectory() as name:
        write_model(ModelSize(1, 64, 64, 1, 1, 64), Path(name), sink=0, window=1)
        return EngineArgs(
            model=name,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=1 << 30,
        ).create_engine_config()
