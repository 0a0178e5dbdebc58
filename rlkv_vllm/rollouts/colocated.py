"""vLLM beside the trainer, on the same machine: an engine in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from rlkv_vllm.allocation.span import Span
from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.child import Child
from rlkv_vllm.engine.launch import start
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.models import EMBEDDED_CACHE_BYTES, MODEL_NAME, model_source
from rlkv_vllm.rollouts.protocol import Gates

if TYPE_CHECKING:
    from vllm import LLM

_DEFAULT_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class ColocatedRollouts(AbstractContextManager["ColocatedRollouts"]):
    """One engine; follows `rlkv_vllm.rollouts.protocol.Rollouts`.

    The engine has a process of its own, because the process groups of vLLM and of accelerate
    cannot live in one. Its scheduler and its worker share that process: between vLLM's own
    processes every token of every request would be sent, here the answers of a step are sent once.
    `options` are further arguments of `vllm.LLM`, the others as of `rlkv_vllm.rollouts`.

    Raises:
        RlkvError: vLLM is missing or refuses, or the job has several processes.
    """

    def __init__(
        self, model: str, revision: str | None, dtype: str, span: Span, options: Mapping[str, Any]
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RlkvError(
                "rollout: vllm-colocate is for a job of one process: use vllm-server, with "
                "`rlkv serve --mode gated` on GPUs of its own"
            )
        environment = {
            name: os.environ.get(name, default) for name, default in _DEFAULT_ENVIRONMENT.items()
        }
        self._child = Child(
            "rollout: the process of vLLM",
            _set_up,
            *(model, revision, dtype, span, dict(options), torch.get_num_threads()),
            environment=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            advice="out of memory? Its own messages are above; fix the cause and continue with "
            "--resume",
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        """One answer per prompt, in their order, all sampled with these gates."""
        answers: list[Answer] = self._child.ask((prompts, sampling, gates))
        return answers

    def __exit__(self, *_: object) -> None:
        self._child.close()


def _set_up(
    model: str, revision: str | None, dtype: str, span: Span, options: dict[str, Any], threads: int
) -> tuple[None, Callable[[Any], list[Answer]]]:
    """Start the engine, in its process."""
    torch.set_num_threads(threads)
    defaults: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        if dtype == "auto":
            defaults["dtype"] = "float32"
        defaults |= _cache_memory(model, options)
    try:
        llm = start(
            model_source(model),
            {"mode": "gated", "sink": span.sink, "window": span.window},
            **(defaults | options),
        )
    except ImportError as error:
        raise RlkvError(
            f"rollout: vllm-colocate needs vLLM ({one_line(error)}): pip install "
            "'rlkv-vllm[cpu]', or use rollout: transformers"
        ) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise RlkvError(f"rollout: vLLM does not start: {one_line(error)}") from error
    return None, lambda question: _generate(llm, *question)


def _cache_memory(model: str, options: Mapping[str, Any]) -> dict[str, int]:
    """A cache beside a trainer: vLLM would claim 92% of the machine."""
    sizes = {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if sizes & options.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    if model == MODEL_NAME:
        return {"kv_cache_memory_bytes": EMBEDDED_CACHE_BYTES}
    return {"kv_cache_memory_bytes": psutil.virtual_memory().available // 4}


def _generate(
    llm: LLM, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
) -> list[Answer]:
    from rlkv_vllm.engine.gated.live import rolled_out, sampling_params, set_gates

    set_gates(llm, gates)
    inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    params = [sampling_params(sampling, i) for i in range(len(inputs))]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    answers = (rolled_out(output.outputs[0]) for output in outputs)
    return [Answer(answer["token_ids"], logprobs=answer["logprobs"]) for answer in answers]
