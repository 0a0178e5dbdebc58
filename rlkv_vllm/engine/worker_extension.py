"""What a worker answers about its split cache, through vLLM's ``--worker-extension-cls``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from rlkv_vllm.engine.cache.head_cache import PADDING, HeadCacheLayer
from rlkv_vllm.engine.cache.specs import RingSpec
from rlkv_vllm.engine.gated.layer import GatedLayer
from rlkv_vllm.engine.report import SplitReport

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RlkvWorkerExtension:
    """Methods that vLLM adds to its worker class; called with ``collective_rpc``."""

    if TYPE_CHECKING:
        vllm_config: VllmConfig

    #: How often the gates of gated mode were set.
    _rlkv_gates_version = 0

    def rlkv_split_report(self) -> dict[str, Any]:
        """Count what is really allocated on this worker.

        ``active`` is False when any attention layer keeps a cache of its own or the head caches are
        not those of the plan, else True beside the fields of :class:`SplitReport`.
        """
        rank, layers = get_tensor_model_parallel_rank(), self._rlkv_layers()
        plans = (getattr(getattr(layer, "impl", None), "plan", None) for layer in layers.values())
        plan = next((plan for plan in plans if plan is not None), None)
        heads = [
            layer
            for name, layer in layers.items()
            if isinstance(layer, HeadCacheLayer) and PADDING not in name
        ]
        rings = sum(isinstance(layer.spec, RingSpec) for layer in heads)
        unsplit = [
            name
            for name, layer in layers.items()
            if not isinstance(layer, HeadCacheLayer)
            and getattr(layer, "kv_sharing_target_layer_name", None) not in layers
        ]
        found = {
            "rank": rank,
            "full_head_caches": len(heads) - rings,
            "streaming_head_caches": rings,
            "unsplit_layers": unsplit,
        }
        if plan is not None and heads and not unsplit:
            allocation = plan.groups.allocation
            expected = (allocation.num_full_on(rank), allocation.num_streaming_on(rank))
            if (len(heads) - rings, rings) == expected:
                report = SplitReport.of(plan, rank, len(heads[0].kv_cache))
                return {"active": True, **found, **asdict(report)}
        return {"active": False, **found}

    def rlkv_gates(self) -> dict[str, Any]:
        """Version, and per layer KV heads of the model and their gates; no layers when this engine
        is not in gated mode.
        """
        impls = self._rlkv_gated_layers()
        return {
            "version": self._rlkv_gates_version,
            "kv_heads": [list(impl.kv_heads) for impl in impls],
            "gates": [impl.gates.tolist() for impl in impls],
        }

    def rlkv_set_gates(self, gates: Sequence[Sequence[float]], version: int) -> None:
        """Attend from the next step on with gates ``[layers][KV heads of the model]``, which
        `gated.live` has checked.
        """
        for impl, row in zip(self._rlkv_gated_layers(), gates, strict=True):
            impl.gates.copy_(torch.tensor([row[head] for head in impl.kv_heads]))
        self._rlkv_gates_version = version

    def _rlkv_layers(self) -> dict[str, Any]:
        """All that owns a KV cache or takes part in one, by name."""
        base: type[Any] = AttentionLayerBase
        return dict(get_layers_from_vllm_config(self.vllm_config, base))

    def _rlkv_gated_layers(self) -> list[GatedLayer]:
        impls = {name: getattr(layer, "impl", None) for name, layer in self._rlkv_layers().items()}
        gated = {name: impl for name, impl in impls.items() if isinstance(impl, GatedLayer)}
        return [gated[name] for name in sorted(gated, key=extract_layer_index)]
