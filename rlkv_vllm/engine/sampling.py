"""vLLM's sampling parameters, made from ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams


def vllm_sampling(sampling: Sampling, index: int, **options: Any) -> SamplingParams:
    """Sampling parameters of one request of a batch.

    The request's index is added to the seed: equal prompts get different answers.
    """
    from vllm import SamplingParams

    return SamplingParams(
        **sampling.model_dump(exclude={"seed", "stop_token_ids"}),
        stop_token_ids=list(sampling.stop_token_ids),
        seed=None if sampling.is_greedy else sampling.seed + index,
        **options,
    )
