"""Attention on the CPU with full and streaming heads in one layer.

Full heads use vLLM's own C++ paged attention. Streaming heads use it over the short block tables of
:mod:`rlkv_vllm.kernels.cpu.ring_tiles` or, where those do not support the sink,
:mod:`rlkv_vllm.kernels.cpu.streaming`. A model without a split uses vLLM's own classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionLayer, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)

from rlkv_vllm.allocation.forecast import BLOCK_SIZE_MULTIPLE
from rlkv_vllm.engine.cache.head_cache import HeadGroup, LayerHeads
from rlkv_vllm.engine.cache.split_layer import StepMetadata, register_layer, step_metadata
from rlkv_vllm.engine.config import gated_config, split_config, split_plan
from rlkv_vllm.engine.cpu.heads import FullHeads, Heads, RingHeads, SplitMetadata, StreamingHeads
from rlkv_vllm.engine.cpu.paged import CacheNumber
from rlkv_vllm.engine.gated.cpu import GatedCPUImpl
from rlkv_vllm.engine.support import check_layer_supported
from rlkv_vllm.kernels.cpu.ring_tiles import serves

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


class SplitCPUBackend(CPUAttentionBackend):
    """Replaces ``CPU_ATTN``; a model without a split gets vLLM's own classes."""

    # Both caches of a layer are written in forward(): the attention layer itself owns none.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object | None = None,
    ) -> list[int | MultipleOf]:
        """vLLM prefers multiples of 32 on the CPU; its kernel takes 16, which rings want."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and split_config(vllm_config) is None:
            return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        vllm_config = get_current_vllm_config()
        if gated_config(vllm_config) is not None:
            return GatedCPUImpl
        return StockCPUImpl if split_config(vllm_config) is None else SplitCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SplitCPUMetadataBuilder]:
        return SplitCPUMetadataBuilder


class StockCPUImpl(CPUAttentionBackendImpl):
    """vLLM's attention, which also writes the cache: see `forward_includes_kv_cache_update`."""

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        shares_cache = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        if attn_metadata is not None and key is not None and value is not None and not shares_cache:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)


class SplitCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Keeps the step's tensors; vLLM's builder for a model without a split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AttentionMetadataBuilder.__init__(self, *args, **kwargs)
        self.split = split_config(self.vllm_config) is not None
        if not self.split:
            super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if not self.split:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return SplitMetadata(**StepMetadata.fields_of(common_attn_metadata))


class SplitCPUImpl(CPUAttentionBackendImpl):
    """Attention of one layer of a split model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_layer_supported(*args, **kwargs)
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()
        self.plan = split_plan(self._vllm_config)
        self.heads: LayerHeads | None = None
        self._bound: list[Heads] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        assert self.plan is not None
        if self.heads is None:
            self.heads = register_layer(self, self.plan, self._vllm_config, act_dtype, self._unbind)
            self.prepare(act_dtype)

    def prepare(self, act_dtype: torch.dtype) -> None:
        """Derive from the layer's heads what every step needs."""
        assert self.plan is not None
        assert self.heads is not None
        self._isa = _get_attn_isa(
            act_dtype, self.plan.geometry.block_size, self.head_size, self.kv_cache_dtype
        )
        groups = self.heads.groups
        self._names = [group.metadata_name for group in groups]
        # KV and query heads of each group, and where each query head of the layer is found in the
        # groups' side by side; not needed by a group that has all heads.
        self._picked: list[tuple[Tensor, Tensor]] = []
        if len(groups) > 1:
            kv_heads, each = [torch.tensor(g.kv_heads) for g in groups], self.num_queries_per_kv
            q_heads = [(h[:, None] * each + torch.arange(each)).flatten() for h in kv_heads]
            self._picked = list(zip(kv_heads, q_heads, strict=True))
            self._order = torch.cat(q_heads).argsort()

    def _bind(self, group: HeadGroup, layer: AttentionLayer) -> Heads:
        assert self.heads is not None
        assert self.plan is not None
        geometry = self.plan.geometry
        number = CacheNumber(self.kv_cache_dtype, layer._k_scale_float, layer._v_scale_float)
        if group is self.heads.full:
            return FullHeads(group.view(), self._isa, self.scale, number)
        if serves(geometry.sink, geometry.window) and not self.is_fp8_kv_cache:
            return RingHeads(group.view(), geometry, self.scale)
        return StreamingHeads(group.view(), geometry, self.scale, number)

    def _unbind(self) -> None:
        self._bound = None

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        **_: None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM profiles the model
            return output
        assert self.heads is not None
        if self._bound is None:
            self._bound = [self._bind(group, layer) for group in self.heads.groups]
        metadata = step_metadata()
        n = attn_metadata.num_actual_tokens
        answer = output
        if len(query) != n:  # padded; four slices cost as much as a call of the operator
            query, key, value, answer = query[:n], key[:n], value[:n], output[:n]
        if not self._picked:
            self._bound[0].attend(metadata[self._names[0]], query, key, value, answer)
            return output
        parts = []
        for heads, name, (kv_heads, query_heads) in zip(
            self._bound, self._names, self._picked, strict=True
        ):
            q = query.index_select(1, query_heads)
            k, v = key.index_select(1, kv_heads), value.index_select(1, kv_heads)
            parts.append(torch.empty_like(q))
            heads.attend(metadata[name], q, k, v, parts[-1])
        torch.index_select(torch.cat(parts, 1), 1, self._order, out=answer)
        return output
