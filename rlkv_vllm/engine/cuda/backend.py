"""Attention on CUDA: one Triton kernel for the full and streaming, or the gated heads of a layer.

Registered as ``AttentionBackendEnum.CUSTOM``; only for split and gated models. Per
layer and step one launch writes the KV of all heads, and all heads attend in the
same launches, see :mod:`rlkv_vllm.kernels.triton.split_attention`.

Nothing here reads a tensor's content: metadata only references vLLM's own
persistent tensors, and what a launch depends on are shapes and host integers,
so a step can be captured into a CUDA graph as it is.

Shape suffixes: N tokens of the step, Q query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from rlkv_vllm.allocation.forecast import BLOCK_SIZE_MULTIPLE
from rlkv_vllm.engine.cache.head_cache import HeadGroup, LayerHeads
from rlkv_vllm.engine.cache.split_layer import StepMetadata, register_layer, step_metadata
from rlkv_vllm.engine.compat import forget_backend_choice
from rlkv_vllm.engine.config import gated_config, split_config, split_plan
from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.engine.support import (
    CUDA_HEAD_DIMS,
    MIN_CUDA_CAPABILITY,
    check_layer_supported,
)
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT
from rlkv_vllm.kernels.triton.split_attention import (
    LayerCache,
    Workspace,
    split_attention,
    write_cache,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class SplitCUDABackend(AttentionBackend):
    """The split KV cache and gated mode as ``--attention-backend CUSTOM``."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    # Both caches of a layer are written in forward(): the attention layer itself owns none.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Name of the member of vLLM's enum under which the class is registered."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object | None = None,
    ) -> list[int | MultipleOf]:
        """The kernel takes pages of 16, 32, 64, ... tokens."""
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head dimensions that the kernel is tested with."""
        return list(CUDA_HEAD_DIMS)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Ampere and later."""
        return tuple(capability) >= MIN_CUDA_CAPABILITY

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Blocks of a ring are given back while a request runs: no connector knows that."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A page is one head: the order of heads and tokens inside it is one and the same."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @staticmethod
    def get_impl_cls() -> type[SplitCUDAImpl | GatedCUDAImpl]:
        """The attention implementation; refused without options of ours."""
        vllm_config = get_current_vllm_config()
        if gated_config(vllm_config) is not None:
            forget_backend_choice()
            return GatedCUDAImpl
        if split_config(vllm_config) is None:
            raise RlkvError(
                "--attention-backend CUSTOM is the split KV cache of rlkv_vllm and no head profile "
                'is given: add additional_config={"rlkv": {"profile": ...}} (rlkv serve --profile) '
                "or remove the flag"
            )
        forget_backend_choice()
        return SplitCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[SplitCUDAMetadataBuilder]:
        """The metadata builder."""
        return SplitCUDAMetadataBuilder


@dataclass
class SplitCUDAMetadata(StepMetadata):
    """One step as one block table sees it."""

    workspace: Workspace


class SplitCUDAMetadataBuilder(AttentionMetadataBuilder[SplitCUDAMetadata]):
    """References the step's tensors; the same metadata serves runs, dummy runs and capture."""

    # Launches depend on shapes and on max_query_len only, which vLLM fixes per graph: 1 for
    # graphs of uniform decode, the number of tokens for graphs of mixed batches.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.workspace = _shared_workspace(
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            num_q_heads=model.get_num_attention_heads(parallel),
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_dim=model.get_head_size(),
            device=device,
            gated=gated_config(vllm_config) is not None,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SplitCUDAMetadata:
        """Metadata of one step for one block table."""
        return SplitCUDAMetadata(
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


@dataclass(frozen=True)
class _Part:
    """Heads of a layer that one kernel call serves.

    All of them, but for a layer without full heads whose streaming heads lie in
    two cache groups: the kernel reads one table of each kind.

    Attributes:
        cache: their caches.
        full: cache layer under which the metadata of the full heads is found.
        ring: the same for the streaming heads.
        kv_heads: None for the whole layer.
        q_heads: as ``kv_heads``.
    """

    cache: LayerCache
    full: str
    ring: str
    kv_heads: slice | None
    q_heads: slice | None


class _CUDAImpl(AttentionImpl[SplitCUDAMetadata]):
    """What both implementations keep of their layer, and the layers that they refuse."""

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
        **unknown: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        check_layer_supported(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            sinks=sinks,
            kv_sharing_target=kv_sharing_target_layer_name,
            other=", ".join(name for name, value in unknown.items() if value is not None),
        )


class SplitCUDAImpl(_CUDAImpl):
    """Attention of one layer of a split model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()
        plan = split_plan(self._vllm_config)
        assert plan is not None, "get_impl_cls refuses a model without a plan"
        self.plan = plan
        self.heads: LayerHeads | None = None
        self._parts: list[_Part] = []

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Register the layer's head caches."""
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
        whole = count == self.num_kv_heads
        return _Part(
            cache=LayerCache.of(caches, streaming),
            full=groups[0].metadata_name,
            ring=groups[-1].metadata_name,
            kv_heads=None if whole else slice(first, first + count),
            q_heads=None if whole else slice(first * g, (first + count) * g),
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SplitCUDAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's KV and attend.

        Args:
            layer: the attention layer.
            query: ``[N, Q, D]``, as all others possibly padded.
            key: ``[N, K, D]``.
            value: as ``key``.
            kv_cache: the cache of the layer's first head; unused.
            attn_metadata: None while vLLM profiles the model.
            output: ``[N, Q, D]``, filled in place.
            output_scale: never given, see ``fused_output_quant_supported``.
            output_block_scale: as ``output_scale``.
        """
        if attn_metadata is None:
            return output.fill_(0)
        assert self._parts, "the head caches are not bound"
        assert output_scale is None
        assert output_block_scale is None
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
            # The whole batch before any read: a request may hit blocks that another one of the
            # same step fills.
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


class GatedCUDAImpl(GatedLayer, _CUDAImpl):
    """Attention of one layer in gated mode, over vLLM's own cache of the layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_gates(self.num_kv_heads)
        # Heads follow each other in every token, whatever the blocks: known before a graph is
        # captured, in which nothing could be copied to the device.
        heads = torch.arange(self.num_kv_heads, dtype=torch.int64, device=self.gates.device)
        self._offsets_H = heads * (2 * self.head_size // OFFSET_UNIT)
        self._streaming_H = torch.ones_like(heads, dtype=torch.int32)

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
        attn_metadata: SplitCUDAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's KV and attend; arguments as of :meth:`SplitCUDAImpl.forward`."""
        if attn_metadata is None:
            return output.fill_(0)
        assert output_scale is None
        assert output_block_scale is None
        cache = LayerCache.of_whole(kv_cache, self._offsets_H, self._streaming_H)
        step, n = attn_metadata, attn_metadata.num_actual_tokens
        k, v, slots = key[:n], value[:n], step.slot_mapping[:n]
        write_cache(k, v, cache, slots, slots)
        split_attention(
            query[:n],
            k,
            v,
            output[:n],
            cache,
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
        return output
