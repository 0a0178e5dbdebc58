"""What a benchmark does with an engine of vLLM in its own process."""

from __future__ import annotations

import os
import random
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import psutil
import torch

from rlkv_vllm.machine import cpu_name
from rlkv_vllm.planning.roofline import Device

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started."""

    variant: str
    model: str  # folder or Hub id
    options: dict[str, Any]  # arguments of `vllm.LLM`
    split: dict[str, Any] | None  # additional_config["rlkv"]; None: stock vLLM without the plugin
    threads: int  # of a CPU engine

    def environment(self) -> dict[str, str | None]:
        """Changes to the parent's environment; None removes a variable."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": None,  # it would override the size of the cache
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_PLUGINS": "none" if self.split is None else "rlkv",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
        }


class Engine:
    """A `vllm.LLM` whose core runs in this process, so that cases can step it.

    Args:
        llm: started with ``VLLM_ENABLE_V1_MULTIPROCESSING=0``.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.vocab = llm.llm_engine.model_config.get_vocab_size()
        self.core: Any = llm.llm_engine.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.config: Any = llm.llm_engine.vllm_config
        self.num_blocks = int(self.config.cache_config.num_gpu_blocks)
        self.step = llm.llm_engine.step
        self._numbers = count()

    def prompt(self, length: int, rng: random.Random) -> list[int]:
        """Random tokens, none of them special."""
        return [rng.randrange(5, self.vocab) for _ in range(length)]

    def add(self, prompt: Sequence[int], params: SamplingParams) -> None:
        request: Any = {"prompt_token_ids": list(prompt)}
        self.llm.llm_engine.add_request(f"bench-{next(self._numbers)}", request, params)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[RequestOutput]:
        """Answers of exactly `max_tokens` tokens."""
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(inputs, params(max_tokens), use_tqdm=False)

    def fill_cache(self) -> None:
        """Write to every page of the KV cache.

        On a CPU, pages that were never written are all mapped to one page of zeros, which the
        processor reads from its own cache.
        """
        runner = self.core.model_executor.driver_worker.worker.model_runner
        storages = {c.untyped_storage().data_ptr(): c.untyped_storage() for c in runner.kv_caches}
        pattern = torch.randn(1 << 20).to(torch.bfloat16)
        for storage in storages.values():
            values = torch.empty(0, dtype=torch.bfloat16, device=storage.device).set_(storage)
            for part in values.split(len(pattern)):
                part.copy_(pattern[: len(part)])

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache; no request may be running."""
        assert self.llm.reset_prefix_cache(), "requests are still running"

    def enter_into_prefix_cache(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Enter prompts into the prefix cache without computing them.

        The content of the pages stays as it is: the time of a step does not depend on it. Returns
        the blocks of the pool that a request with each prompt holds.
        """
        from vllm.v1.request import Request

        manager = self.scheduler.kv_cache_manager
        held = []
        for i, prompt in enumerate(prompts):
            request = Request(
                request_id=f"warm-{i}",
                prompt_token_ids=list(prompt),
                sampling_params=params(1),
                pooling_params=None,
                block_hasher=self.core.request_block_hasher,
            )
            before = manager.block_pool.get_num_free_blocks()
            manager.new_step_starts()
            allocated = manager.allocate_slots(request, len(prompt))
            assert allocated is not None, "the cache is too small"
            manager.take_new_block_ids()
            held.append(before - manager.block_pool.get_num_free_blocks())
            manager.free(request)
        return held

    def run_until_decoding(self, requests: int) -> None:
        """Step until so many requests run and none of them has prompt tokens left."""
        while len(self.scheduler.running) < requests or any(
            request.num_computed_tokens < request.num_prompt_tokens
            for request in self.scheduler.running
        ):
            self.step()

    def drain(self) -> None:
        """Abort all requests."""
        self.llm.llm_engine.abort_request(list(self.scheduler.requests), internal=True)
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()


def params(max_tokens: int) -> SamplingParams:
    """Greedy answers of exactly `max_tokens` tokens, returned once at the end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def probe_device(dtype_bytes: int) -> Device:
    """Copy bandwidth and speed of matrix products of the device that engines run on."""
    is_cuda = torch.cuda.is_available()
    kind = "cuda" if is_cuda else "cpu"
    dtype = torch.float32 if dtype_bytes == 4 else torch.bfloat16

    def least_seconds(function: Any) -> float:
        def run() -> None:
            function()
            if is_cuda:
                torch.cuda.synchronize()

        return min(timeit.repeat(run, number=1, repeat=9))

    source = torch.ones((1024 if is_cuda else 128) << 20, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    copying = least_seconds(lambda: target.copy_(source))
    size = 8192 if is_cuda else 1024
    left = torch.ones(size, size, dtype=dtype, device=kind)
    product = torch.empty_like(left)
    multiplying = least_seconds(lambda: torch.mm(left, left, out=product))
    if is_cuda:
        properties = torch.cuda.get_device_properties(0)
        name, memory = str(properties.name), int(properties.total_memory)
    else:
        name, memory = cpu_name(), int(psutil.virtual_memory().total)
    return Device(name, memory, 2 * source.numel() / copying, 2 * size**3 / multiplying)


def has_cuda() -> bool:
    return bool(torch.cuda.is_available())


def free_bytes(is_cuda: bool) -> int:
    if is_cuda:
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
