"""Gated attention on the CPU: what the profile job rolls out with.

Only what a page holds and how it is attended to is ours, see :mod:`rlkv_vllm.kernels.cpu.gated`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.kernels.cpu.gated import gated_attention, write_pages


class GatedCPUImpl(GatedLayer, CPUAttentionBackendImpl):
    """Attention of one layer."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cache: Tensor, step: Any
    ) -> None:
        write_pages(k, v, cache, step.slot_mapping[: len(k)])
        gated_attention(
            q,
            cache,
            step.block_table,
            step.seq_lens,
            step.query_start_loc,
            self.gates,
            out,
            sink=self.config.sink,
            window=self.config.window,
            scale=self.scale,
        )
