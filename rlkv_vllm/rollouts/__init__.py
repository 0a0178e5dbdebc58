"""Engines in gated mode that write the answers of a training job."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlkv_vllm.allocation.span import Span
    from rlkv_vllm.rollouts.config import RolloutConfig
    from rlkv_vllm.rollouts.protocol import Rollouts


def open_rollouts(
    config: RolloutConfig, model: str, revision: str | None, dtype: str, span: Span
) -> AbstractContextManager[Rollouts | None]:
    """The engine that a job asks for, ready; None for transformers' generate.

    Model, revision and dtype are as in `JobConfig`; `span` is that of local attention (tokens).

    Raises:
        RlkvError: it cannot be started or reached, or does not fit the job.
    """
    if config.engine == "transformers":
        return nullcontext()
    if config.engine == "vllm-server":
        from rlkv_vllm.rollouts.server import ServerRollouts

        return ServerRollouts(config.servers, span)
    from rlkv_vllm.rollouts.colocated import ColocatedRollouts

    return ColocatedRollouts(model, revision, dtype, span, config.options)
