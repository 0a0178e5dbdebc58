"""Attention on the CPU with full and streaming heads in one layer.

Full heads go through vLLM's own C++ paged attention, streaming heads through
:mod:`rlkv_vllm.kernels.streaming`. Without a split plan everything is vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionLayer, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)

from rlkv_vllm.allocation.forecast import BLOCK_SIZE_MULTIPLE
from rlkv_vllm.engine.config import gated_config, split_config, split_plan
from rlkv_vllm.engine.gated_cpu import GatedCPUImpl
from rlkv_vllm.engine.head_cache import HeadGroup, LayerHeads
from rlkv_vllm.engine.split_layer import StepMetadata, register_layer, step_metadata
from rlkv_vllm.engine.support import check_layer_supported
from rlkv_vllm.kernels.streaming import StepPlan, plan_step, streaming_attention

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class SplitCPUBackend(CPUAttentionBackend):
    """Stands in for ``CPU_ATTN``; vLLM's own classes do the work without a split plan."""

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
    def get_impl_cls() -> type[SplitCPUImpl | GatedCPUImpl]:
        """The attention implementation."""
        if gated_config(get_current_vllm_config()) is not None:
            return GatedCPUImpl
        return SplitCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SplitCPUMetadataBuilder]:
        """The metadata builder."""
        return SplitCPUMetadataBuilder


@dataclass
class SplitMetadata(StepMetadata):
    """One step as one block table sees it; derived parts are made once and shared by layers."""

    full_schedules: dict[int, torch.Tensor] = field(default_factory=dict)
    streaming_plan: StepPlan | None = None


class SplitCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Keeps the step's tensors; vLLM's builder when there is no split plan."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.split = split_config(vllm_config) is not None
        if not self.split:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Metadata of one step for one block table."""
        if not self.split:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return SplitMetadata(**StepMetadata.fields_of(common_attn_metadata))


class SplitCPUImpl(CPUAttentionBackendImpl):
    """Attention of one layer; vLLM's own when there is no split plan."""

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
            **kwargs,
        )
        self._vllm_config = get_current_vllm_config()
        self.plan = split_plan(self._vllm_config)
        if self.plan is not None:
            check_layer_supported(
                alibi_slopes=alibi_slopes,
                sliding_window=sliding_window,
                logits_soft_cap=logits_soft_cap,
                attn_type=attn_type,
                sinks=sinks,
                kv_sharing_target=kv_sharing_target_layer_name,
            )
        self.heads: LayerHeads | None = None
        self._views: list[torch.Tensor] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Register the layer's head caches: the only hook before vLLM collects cache specs."""
        super().process_weights_after_loading(act_dtype)
        if self.plan is None or self.heads is not None:
            return
        self._isa = _get_attn_isa(act_dtype, self.plan.geometry.block_size, self.head_size)
        self.heads = register_layer(self, self.plan, self._vllm_config, act_dtype, self._drop_views)
        self._head_index = [self._indices(group) for group in self.heads.groups]

    def _indices(self, group: HeadGroup) -> tuple[torch.Tensor, torch.Tensor] | None:
        """KV heads and query heads of a group, or None when it is the whole layer."""
        if len(group.kv_heads) == self.num_kv_heads:
            return None
        g = self.num_queries_per_kv
        query_heads = [h * g + i for h in group.kv_heads for i in range(g)]
        return torch.tensor(group.kv_heads), torch.tensor(query_heads)

    def _drop_views(self) -> None:
        self._views = None

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
        """Write the step's KV and attend.

        Args:
            layer: the attention layer.
            query: ``[tokens, query heads, head_dim]``.
            key: ``[tokens, KV heads, head_dim]``.
            value: as ``key``.
            kv_cache: the cache of the layer's first head; unused when split.
            attn_metadata: None while vLLM profiles the model.
            output: ``[tokens, query heads, head_dim]``, filled in place.
            output_scale: not supported by the CPU backend.
            output_block_scale: not supported by the CPU backend.
        """
        if attn_metadata is None:
            return output
        if self.plan is None:
            if key is not None and value is not None and not self._shares_cache(layer):
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        assert self.heads is not None
        metadata = step_metadata()
        if self._views is None:
            self._views = [group.view() for group in self.heads.groups]
        n = attn_metadata.num_actual_tokens
        for group, view, index in zip(
            self.heads.groups, self._views, self._head_index, strict=True
        ):
            q, k, v, out = query[:n], key[:n], value[:n], output[:n]
            if index is not None:
                kv_heads, query_heads = index
                q = q.index_select(1, query_heads)
                k, v = k.index_select(1, kv_heads), v.index_select(1, kv_heads)
                out = torch.empty_like(q)
            attend = self._full if group is self.heads.full else self._streaming
            attend(metadata[group.metadata_name], view, q, k, v, out)
            if index is not None:
                output[:n].index_copy_(1, query_heads, out)
        return output

    @staticmethod
    def _shares_cache(layer: AttentionLayer) -> bool:
        return getattr(layer, "kv_sharing_target_layer_name", None) is not None

    def _full(
        self,
        step: SplitMetadata,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        num_blocks, num_heads, block_size, _ = cache.shape
        key_cache, value_cache = cache.view(
            num_blocks, num_heads, block_size * 2, self.head_size
        ).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, step.slot_mapping, self._isa
        )
        schedule = step.full_schedules.get(num_heads)
        if schedule is None:
            schedule = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=step.seq_lens.shape[0],
                num_heads=num_heads * self.num_queries_per_kv,
                num_kv_heads=num_heads,
                head_dim=self.head_size,
                seq_lens=step.seq_lens,
                dtype=query.dtype,
                query_start_loc=step.query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=self._isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
            step.full_schedules[num_heads] = schedule
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step.block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )

    def _streaming(
        self,
        step: SplitMetadata,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        assert self.plan is not None
        n, num_heads, d = key.shape
        _, _, block_size, content = cache.shape
        if step.streaming_plan is None:
            step.streaming_plan = plan_step(
                step.block_table,
                step.seq_lens,
                step.query_start_loc,
                step.slot_mapping[:n],
                block_size=block_size,
                sink=self.plan.geometry.sink,
                window=self.plan.geometry.window,
            )
        # [heads, slots, 2 * head_dim]: a head's blocks are dense, so slots are rows.
        slots = cache.as_strided(
            (num_heads, cache.shape[0] * block_size, content),
            (cache.stride(1), content, 1),
            cache.storage_offset(),
        )
        group = self.num_queries_per_kv
        streaming_attention(
            step.streaming_plan,
            slots,
            query.view(n, num_heads, group, d),
            key,
            value,
            output.view(n, num_heads, group, d),
            self.scale,
        )
