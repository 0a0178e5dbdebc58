"""Gated attention on the CPU: what the profile job rolls out with.

Only what a page holds and how it is attended to is ours, see :mod:`rlkv_vllm.kernels.cpu.gated`.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.kernels.cpu.gated import gated_attention, write_pages


class GatedCPUImpl(GatedLayer, CPUAttentionBackendImpl):
    """Attention of one layer."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        kv_cache: torch.Tensor,
        step: CPUAttentionMetadata,
    ) -> None:
        write_pages(key, value, kv_cache, step.slot_mapping[: len(key)])
        gated_attention(
            query,
            kv_cache,
            step.block_table,
            step.seq_lens,
            step.query_start_loc,
            self.gates,
            output,
            sink=self.config.sink,
            window=self.config.window,
            scale=self.scale,
        )
