"""Engines in gated mode that write the answers of a profile job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlkv_vllm.rollouts.queue import Rollouts
    from rlkv_vllm.training.config import TrainConfig


@contextmanager
def open_rollouts(config: TrainConfig) -> Iterator[Rollouts | None]:
    """The engine that a job asks for, ready; None for transformers' generate.

    Raises:
        RlkvError: it cannot be started or reached, or does not fit the job.
    """
    if config.rollout.engine == "transformers":
        yield None
        return
    if config.rollout.engine == "vllm-server":
        from rlkv_vllm.rollouts.server import ServerRollouts

        with ServerRollouts(config.rollout.servers, config.span) as servers:
            yield servers
        return
    from rlkv_vllm.rollouts.colocated import ColocatedRollouts

    with ColocatedRollouts(config) as engine:
        yield engine
