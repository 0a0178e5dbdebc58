"""What the kernels for CUDA need to know of a step, for one block table.

Nothing here reads a tensor's content: metadata only references vLLM's own persistent tensors, and
what a launch depends on are shapes and host integers, so a step can be captured into a CUDA graph
as it is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from rlkv_vllm.engine.cache.split_layer import StepMetadata
from rlkv_vllm.engine.config import gated_config
from rlkv_vllm.kernels.triton.split_attention import Workspace

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class CUDAMetadata(StepMetadata):
    """One step as one block table sees it."""

    workspace: Workspace


class CUDAMetadataBuilder(AttentionMetadataBuilder[CUDAMetadata]):
    """References the step's tensors; the same metadata serves runs, dummy runs and capture."""

    # Launches depend on shapes and on max_query_len only, which vLLM fixes per graph: 1 for
    # graphs of uniform decode, the number of tokens for graphs of mixed batches.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = self.vllm_config
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.workspace = _shared_workspace(
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            num_q_heads=model.get_num_attention_heads(parallel),
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_dim=model.get_head_size(),
            device=self.device,
            gated=gated_config(vllm_config) is not None,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CUDAMetadata:
        return CUDAMetadata(
            **StepMetadata.fields_of(common_attn_metadata), workspace=self.workspace
        )


_workspaces: weakref.WeakValueDictionary[tuple[Any, ...], Workspace] = weakref.WeakValueDictionary()


def _shared_workspace(**sizes: Any) -> Workspace:
    """One workspace for all layers and block tables, as long as a builder keeps it."""
    key = tuple(sizes.items())
    workspace = _workspaces.get(key)
    if workspace is None:
        workspace = _workspaces[key] = Workspace.of(**sizes)
    return workspace
