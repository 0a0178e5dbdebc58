"""Attention on the CPU with a gate per KV head: what the profile job rolls out with.

Every head keeps its whole cache, managed by vLLM as always; only what a page holds and how it is
attended to is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.engine.support import check_layer_supported
from rlkv_vllm.kernels.cpu.gated import gated_attention, write_pages

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer


class GatedCPUImpl(GatedLayer, CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )
        check_layer_supported(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            sinks=sinks,
            kv_sharing_target=kv_sharing_target_layer_name,
            other=", ".join(kwargs),
        )
        self.init_gates(num_kv_heads)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Check the layer, which now exists."""
        super().process_weights_after_loading(act_dtype)
        self.check_layer()

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's KV and attend; arguments as in vLLM's own implementation."""
        if attn_metadata is None:  # vLLM profiles the model
            return output
        n = attn_metadata.num_actual_tokens
        write_pages(key[:n], value[:n], kv_cache, attn_metadata.slot_mapping[:n])
        gated_attention(
            query[:n],
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            self.gates,
            output[:n],
            sink=self.config.sink,
            window=self.config.window,
            scale=self.scale,
        )
        return output
