"""Attention of one layer on CUDA: one Triton kernel for its full and streaming heads.

Per layer and step one launch writes the KV of all heads, and all heads attend in the same launches,
see :mod:`rlkv_vllm.kernels.triton.split_attention`.

Shape suffixes: N tokens of the step, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer

from rlkv_vllm.engine.cache.head_cache import HeadGroup, LayerHeads
from rlkv_vllm.engine.cache.split_layer import register_layer, step_metadata
from rlkv_vllm.engine.config import split_plan
from rlkv_vllm.engine.support import check_layer_supported
from rlkv_vllm.kernels.triton.split_attention import LayerCache, split_attention, write_cache

if TYPE_CHECKING:
    from rlkv_vllm.engine.cuda.metadata import CUDAMetadata


@dataclass(frozen=True)
class _Part:
    """Heads of a layer that one kernel call serves.

    All of them (then without slices), but for a layer without full heads whose streaming heads
    lie in two cache groups: the kernel reads one table of each kind.
    """

    cache: LayerCache
    full: str  # cache layer under which the metadata of the full heads is found
    ring: str  # the same of the streaming heads
    kv_heads: slice | None
    q_heads: slice | None


class CUDAImpl(AttentionImpl[Any]):
    """What vLLM asks of every implementation."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *_: Any,
        **__: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype


class SplitCUDAImpl(CUDAImpl):
    """Attention of one layer of a split model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_layer_supported(*args, **kwargs)
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()
        plan = split_plan(self._vllm_config)
        assert plan is not None, "get_impl_cls refuses a model without a plan"
        self.plan = plan
        self.heads: LayerHeads | None = None
        self._parts: list[_Part] = []

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.heads is None:
            self.heads = register_layer(
                self, self.plan, self._vllm_config, act_dtype, self._caches_changed
            )

    def _caches_changed(self) -> None:
        """Address the caches once all heads have theirs: never while a graph is captured."""
        self._parts = []
        assert self.heads is not None
        caches = [layer.kv_cache for group in self.heads.groups for layer in group.layers]
        # vLLM binds one head after the other, all of them in one allocation.
        storages = {cache.untyped_storage().data_ptr() for cache in caches}
        if len(storages) == 1 and all(cache.numel() for cache in caches):
            full, rings = self.heads.full, self.heads.streaming
            if len(rings) > 1:
                assert full is None, "the packing gives a layer with full heads one ring group"
                self._parts = [self._part(None, ring) for ring in rings]
            else:
                self._parts = [self._part(full, rings[0] if rings else None)]

    def _part(self, full: HeadGroup | None, ring: HeadGroup | None) -> _Part:
        groups = [group for group in (full, ring) if group is not None]
        heads = {
            head: (layer.kv_cache[:, 0], group is ring)
            for group in groups
            for head, layer in zip(group.kv_heads, group.layers, strict=True)
        }
        first, count, g = min(heads), len(heads), self.num_heads // self.num_kv_heads
        assert sorted(heads) == list(range(first, first + count)), "heads of a part have a gap"
        caches, streaming = zip(*(heads[head] for head in sorted(heads)), strict=True)
        has_all = count == self.num_kv_heads
        return _Part(
            cache=LayerCache.of(caches, streaming),
            full=groups[0].metadata_name,
            ring=groups[-1].metadata_name,
            kv_heads=None if has_all else slice(first, first + count),
            q_heads=None if has_all else slice(first * g, (first + count) * g),
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CUDAMetadata | None,
        output: Tensor,
        **_: None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM profiles the model
            return output.fill_(0)
        assert self._parts, "the head caches are not bound"
        steps = step_metadata()
        geometry = self.plan.geometry
        n = attn_metadata.num_actual_tokens
        q_NQD, k_NKD, v_NKD, out_NQD = query[:n], key[:n], value[:n], output[:n]
        for part in self._parts:
            full, ring = steps[part.full], steps[part.ring]
            q, k, v, out = q_NQD, k_NKD, v_NKD, out_NQD
            if part.kv_heads is not None:
                q, out = q[:, part.q_heads], out[:, part.q_heads]
                k, v = k[:, part.kv_heads], v[:, part.kv_heads]
            # All requests before any read: one may hit blocks that another one of the same step
            # fills.
            write_cache(k, v, part.cache, full.slot_mapping[:n], ring.slot_mapping[:n])
            split_attention(
                q,
                k,
                v,
                out,
                part.cache,
                full_table_RB=full.block_table,
                ring_table_RB=ring.block_table,
                query_start_loc=full.query_start_loc,
                seq_lens=full.seq_lens,
                max_query_len=full.max_query_len,
                workspace=full.workspace,
                sink=geometry.sink,
                window=geometry.window,
                scale=self.scale,
            )
        return output
