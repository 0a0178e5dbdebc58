"""Gated attention on CUDA: the kernels of the split cache over vLLM's own cache of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkv_vllm.engine.cuda.layer import CUDAImpl
from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT
from rlkv_vllm.kernels.triton.split_attention import LayerCache, split_attention, write_cache


class GatedCUDAImpl(GatedLayer, CUDAImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Heads follow each other in every token, whatever the blocks: known before a graph is
        # captured, in which nothing could be copied to the device.
        heads = torch.arange(self.num_kv_heads, dtype=torch.int64, device=self.gates.device)
        self._offsets_H = heads * (2 * self.head_size // OFFSET_UNIT)
        self._streaming_H = torch.ones_like(heads, dtype=torch.int32)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cache: Tensor, step: Any
    ) -> None:
        layer_cache = LayerCache.of_whole(cache, self._offsets_H, self._streaming_H)
        slots = step.slot_mapping[: len(k)]
        write_cache(k, v, layer_cache, slots, slots)
        split_attention(
            q,
            k,
            v,
            out,
            layer_cache,
            full_table_RB=step.block_table,
            ring_table_RB=step.block_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            max_query_len=step.max_query_len,
            workspace=step.workspace,
            sink=self.config.sink,
            window=self.config.window,
            scale=self.scale,
            gates_H=self.gates,
        )
