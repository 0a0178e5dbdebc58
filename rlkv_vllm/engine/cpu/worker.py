"""vLLM's worker for the CPU, in which a seed and a chunked prompt do not end the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.cpu_worker import CPUWorker

from rlkv_vllm.engine.compat import generators_of_kept_samples

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class SplitCPUWorker(CPUWorker):
    """Works around a fault of vLLM, see `generators_of_kept_samples`."""

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        with generators_of_kept_samples(self.model_runner):
            return super().sample_tokens(grammar_output)
