"""The gates of one attention layer: what gated mode has in common on all platforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from rlkv_vllm.engine.compat import attention_layer_name
from rlkv_vllm.engine.config import gated_config
from rlkv_vllm.engine.support import check_layer_shape

if TYPE_CHECKING:
    from rlkv_vllm.engine.config import GatedConfig


class GatedLayer:
    """Part of an attention implementation in gated mode.

    Attributes:
        config: sink and window.
        gates: of this rank's KV heads, float32; changed in place, between two steps, so that
            CUDA graphs read them where they were.
        kv_heads: which KV heads of the model these are.
    """

    config: GatedConfig
    gates: torch.Tensor
    kv_heads: range

    def init_gates(self, num_kv_heads: int) -> None:
        """Set the attributes; all gates are 1."""
        vllm_config = self._vllm_config = get_current_vllm_config()
        config = gated_config(vllm_config)
        assert config is not None
        self.config = config
        # A model is built with its own type as the default.
        self.gates = torch.ones(
            num_kv_heads, dtype=torch.float32, device=vllm_config.device_config.device
        )
        # Ranks take KV heads in order; where there are more ranks than heads, vLLM copies heads.
        total = vllm_config.model_config.get_total_num_kv_heads()
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        first = get_tensor_model_parallel_rank() * total // tp_size
        self.kv_heads = range(first, first + num_kv_heads)

    def check_layer(self) -> None:
        """Refuse a layer that is not like all others of the model, or masks as it likes."""
        name = attention_layer_name(self._vllm_config, self)
        layer = self._vllm_config.compilation_config.static_forward_context[name]
        model = self._vllm_config.model_config
        check_layer_shape(
            layer_class=type(layer).__name__,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            expected=(
                model.get_num_kv_heads(self._vllm_config.parallel_config),
                model.get_head_size(),
            ),
            dtypes="",
        )
