"""vLLM's worker for the CPU, with seeds that survive a prompt prefilled in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class SplitCPUWorker(CPUWorker):
    """Keeps a request's generator away from samples that are thrown away.

    Every chunk of a prompt but the last samples a token for nothing. vLLM 0.32 then winds
    the request's generator back by an offset, which generators of the CPU do not have: the
    engine dies with ``CPU Generator does not use offset``. Goes when vLLM mends it.
    """

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample the step's tokens."""
        # The sampler reads this very dict, and draws for whoever is not in it from its own.
        generators = self.model_runner.input_batch.generators
        thrown_away = self.model_runner.discard_request_mask.np
        kept_away = {i: generators.pop(i) for i in list(generators) if thrown_away[i]}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators |= kept_away
