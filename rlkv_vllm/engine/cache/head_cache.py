"""Cache layers: each KV head of an attention layer is one cache layer of vLLM.

One page is then one head times one block, whatever the head's kind, so any mix
of full and streaming heads shares one block pool without padding inside a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from rlkv_vllm.allocation.groups import FULL_GROUP
from rlkv_vllm.engine.cache.specs import RingSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

    from rlkv_vllm.engine.config import SplitPlan

#: In the names of dummy cache layers, see `register_head_caches`.
PADDING = ".kvpad"


class HeadCacheLayer(AttentionLayerBase):
    """The cache of one KV head; has no weights and no forward.

    It has the query heads of its attention layer on this rank: vLLM builds one metadata object per
    group only if all its layers agree.
    """

    def __init__(
        self, backend: type[AttentionBackend], num_q_heads: int, spec: AttentionSpec
    ) -> None:
        self.backend = backend
        self.num_heads = num_q_heads
        self.spec = spec
        self.on_bind: Callable[[], None] | None = None
        self.kv_cache = torch.tensor([])
        self.kv_sharing_target_layer_name: str | None = None

    @property
    def kv_cache(self) -> torch.Tensor:
        """The head's cache, ``[blocks, 1, block_size, 2 * head_dim]``; empty until it is bound."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, cache: torch.Tensor) -> None:
        # A setter, not bind_kv_cache: vLLM takes a cache away (after it has profiled CUDA
        # graphs on a small one) by assigning an empty tensor, and nothing may keep it alive.
        self._kv_cache = cache
        if self.on_bind is not None:
            self.on_bind()

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one attention layer that read one block table."""

    kv_heads: tuple[int, ...]  # indices among the rank's KV heads, ascending
    names: tuple[str, ...]
    layers: tuple[HeadCacheLayer, ...]

    @property
    def metadata_name(self) -> str:
        """Cache layer under which the step's metadata of this group is found."""
        return self.names[0]

    def view(self) -> torch.Tensor:
        """``[blocks, heads, block_size, 2 * head_dim]`` over the heads' caches.

        The heads of a layer lie a constant number of bytes apart because vLLM
        lays a group's cache layers out in order and they were registered together.
        """
        caches = [layer.kv_cache for layer in self.layers]
        first = caches[0]
        num_blocks, _, block_size, content = first.shape
        item = first.element_size()
        stride = (caches[1].data_ptr() - first.data_ptr()) // item if len(caches) > 1 else 1
        assert all(
            cache.data_ptr() - first.data_ptr() == i * stride * item
            for i, cache in enumerate(caches)
        ), "cache layers of one attention layer are not equally spaced"
        return torch.as_strided(
            first,
            (num_blocks, len(caches), block_size, content),
            (first.stride(0), stride, first.stride(2), 1),
            first.storage_offset(),
        )


@dataclass(frozen=True)
class LayerHeads:
    """The head groups of one attention layer on one rank."""

    full: HeadGroup | None
    streaming: tuple[HeadGroup, ...]

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """All groups, the full one first."""
        return ((self.full,) if self.full else ()) + self.streaming


def register_head_caches(
    plan: SplitPlan, vllm_config: VllmConfig, layer_name: str, layer: Any, rank: int
) -> LayerHeads:
    """Register one cache layer per KV head of vLLM's attention layer in its forward context.

    Dummy cache layers fill smaller groups up to the largest one of the rank, so
    that vLLM's grouping makes exactly one group of each bucket. They lie in
    bytes of the block that a smaller group leaves unused anyway.
    """
    context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    groups, backend = plan.groups, layer.get_attn_backend()

    def add(name: str, group: int) -> HeadCacheLayer:
        spec = _spec(plan, vllm_config, group, layer)
        context[name] = HeadCacheLayer(backend, layer.num_heads, spec)
        return context[name]

    members: dict[int, list[tuple[int, str, HeadCacheLayer]]] = {}
    for local, head in enumerate(groups.allocation.heads_of(rank)):
        group = groups.group_of[extract_layer_index(layer_name)][head]
        # vLLM allows exactly one dot-separated integer in a cache layer's name. With
        # more ranks than heads several ranks hold the same head, each its own layer.
        name = f"{layer_name}.kvh{head}" + (
            f"_r{rank}" if groups.allocation.tp_size > plan.geometry.num_kv_heads else ""
        )
        members.setdefault(group, []).append((local, name, add(name, group)))
    if not any(PADDING in name for name in context):
        for group in range(groups.num_ring_groups + 1):
            for i in range(groups.padding(rank, group)):
                add(f"{layer_name}{PADDING}_r{rank}_g{group}_{i}", group)

    def head_group(group: int) -> HeadGroup:
        kv_heads, names, layers = zip(*members[group], strict=True)
        return HeadGroup(kv_heads, names, layers)

    return LayerHeads(
        full=head_group(FULL_GROUP) if FULL_GROUP in members else None,
        streaming=tuple(head_group(g) for g in sorted(members) if g != FULL_GROUP),
    )


def _spec(plan: SplitPlan, vllm_config: VllmConfig, group: int, layer: Any) -> AttentionSpec:
    head = {"num_kv_heads": 1, "head_size": layer.head_size, "dtype": layer.kv_cache_torch_dtype}
    block_size = plan.geometry.block_size
    if group == FULL_GROUP:
        return FullAttentionSpec(block_size=block_size, **head)
    return RingSpec(
        block_size=block_size,
        **head,
        sliding_window=plan.geometry.window,
        sink=plan.geometry.sink,
        cache_group=group,
        retention_interval=plan.retention_interval,
        num_groups=plan.groups.num_ring_groups + 1,
        chunk_blocks=cdiv(vllm_config.max_in_flight_tokens, block_size),
        steps_in_flight=vllm_config.max_concurrent_batches,
    )
