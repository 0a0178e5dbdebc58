"""Attention of one layer in gated mode: what all platforms have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionImpl

from rlkv_vllm.allocation.heads import heads_of_rank
from rlkv_vllm.engine.compat import attention_layer
from rlkv_vllm.engine.config import gated_config
from rlkv_vllm.engine.support import check_layer_shape, check_layer_supported

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer


class GatedLayer(AttentionImpl[Any]):
    """Every head keeps its full cache, managed by vLLM as always.

    `gates`, of this rank's `kv_heads`, are float32 and changed in place, between two steps, so that
    CUDA graphs read them where they were.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_layer_supported(*args, **kwargs)
        super().__init__(*args, **kwargs)
        vllm_config = self._vllm_config = get_current_vllm_config()
        config = gated_config(vllm_config)
        assert config is not None
        self.config = config
        # A model is built with its own type as the default.
        self.gates = torch.ones(
            self.num_kv_heads, dtype=torch.float32, device=vllm_config.device_config.device
        )
        self.kv_heads = heads_of_rank(
            get_tensor_model_parallel_rank(),
            vllm_config.model_config.get_total_num_kv_heads(),
            vllm_config.parallel_config.tensor_parallel_size,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Refuse a layer, which now exists, that is not like all others or masks differently."""
        super().process_weights_after_loading(act_dtype)
        _, layer = attention_layer(self._vllm_config, self)
        model = self._vllm_config.model_config
        num_kv_heads = model.get_num_kv_heads(self._vllm_config.parallel_config)
        check_layer_shape(layer, (num_kv_heads, model.get_head_size()))

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **_: None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM profiles the model
            return output.fill_(0)
        n = attn_metadata.num_actual_tokens
        self.attend(query[:n], key[:n], value[:n], output[:n], kv_cache, attn_metadata)
        return output

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cache: Tensor, step: Any
    ) -> None:
        """Write the step's keys and values into the layer's cache, attend, and fill ``out``.

        ``q`` to ``out``: ``[tokens, heads, head_dim]``; ``step``: the backend's metadata.
        """
