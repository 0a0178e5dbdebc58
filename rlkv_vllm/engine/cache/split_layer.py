"""The split of one attention layer: what the backends of all platforms have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionImpl

from rlkv_vllm.engine.cache.head_cache import LayerHeads, register_head_caches
from rlkv_vllm.engine.compat import attention_layer
from rlkv_vllm.engine.config import SplitPlan
from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.engine.support import check_layer_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

logger = init_logger("vllm.rlkv")


@dataclass
class StepMetadata:
    """One step as one block table sees it: tensors of vLLM's, referenced and never read here."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor

    @staticmethod
    def fields_of(common: CommonAttentionMetadata) -> dict[str, Any]:
        """The fields, from what vLLM hands to every metadata builder."""
        return {
            "num_actual_tokens": common.num_actual_tokens,
            "max_query_len": common.max_query_len,
            "query_start_loc": common.query_start_loc,
            "seq_lens": common.seq_lens,
            "block_table": common.block_table_tensor,
            "slot_mapping": common.slot_mapping,
        }


def step_metadata() -> dict[str, Any]:
    """Metadata of the running step by cache layer."""
    metadata = get_forward_context().attn_metadata
    assert isinstance(metadata, dict), "micro-batches are refused at start-up"
    return metadata


def register_layer(
    impl: AttentionImpl[Any],
    plan: SplitPlan,
    vllm_config: VllmConfig,
    act_dtype: torch.dtype,
    on_bind: Callable[[], None],
) -> LayerHeads:
    """Give an attention layer one cache layer per KV head, and none of its own.

    Called from ``process_weights_after_loading``: the only hook between the
    layer's construction and vLLM's collection of cache specs. ``on_bind`` is called whenever a
    head of the layer gets or loses its cache.

    Raises:
        RlkvError: the layer is not like all others of the model.
    """
    name, layer = attention_layer(vllm_config, impl)
    cache_dtype = layer.kv_cache_torch_dtype
    expected_dtype = kv_cache_dtype_str_to_dtype(
        vllm_config.cache_config.cache_dtype, vllm_config.model_config
    )
    check_layer_shape(
        layer,
        (plan.groups.allocation.heads_per_rank, plan.geometry.head_dim),
        "" if cache_dtype == expected_dtype else f"{act_dtype}, cache {cache_dtype}",
    )
    rank = get_tensor_model_parallel_rank()
    heads = register_head_caches(plan, vllm_config, name, layer, rank)
    cache_layers = [cache_layer for group in heads.groups for cache_layer in group.layers]
    for cache_layer in cache_layers:
        cache_layer.on_bind = on_bind
    if extract_layer_index(name) == 0 and rank == 0:
        first = cache_layers[0]

        def report_too() -> None:
            on_bind()
            num_blocks = len(first.kv_cache)
            # A cache that is bound only to profile CUDA graphs is not the pool.
            if num_blocks and num_blocks == vllm_config.cache_config.num_gpu_blocks:
                # What it really holds: vLLM's own figure counts a ring's admission cap.
                logger.info_once("%s", SplitReport.of(plan, 0, num_blocks).sentence())

        first.on_bind = report_too
    # The attention layer owns no cache but needs an entry in the step's metadata.
    layer.kv_sharing_target_layer_name = heads.groups[0].metadata_name
    return heads
