"""The attention backend for CUDA, ``AttentionBackendEnum.CUSTOM``: for split and gated models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from rlkv_vllm.allocation.forecast import BLOCK_SIZE_MULTIPLE
from rlkv_vllm.engine.compat import forget_backend_choice
from rlkv_vllm.engine.config import gated_config, split_config
from rlkv_vllm.engine.cuda.layer import SplitCUDAImpl
from rlkv_vllm.engine.cuda.metadata import CUDAMetadataBuilder
from rlkv_vllm.engine.gated.cuda import GatedCUDAImpl
from rlkv_vllm.engine.support import CUDA_HEAD_DIMS, MIN_CUDA_CAPABILITY
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.platforms.interface import DeviceCapability


class SplitCUDABackend(AttentionBackend):
    """The split KV cache and gated mode as ``--attention-backend CUSTOM``."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    # Both caches of a layer are written in forward(): the attention layer itself owns none.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object | None = None,
    ) -> list[int | MultipleOf]:
        """The kernel takes pages of 16, 32, 64, ... tokens."""
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(CUDA_HEAD_DIMS)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
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
        """Refused without options of ours."""
        vllm_config = get_current_vllm_config()
        is_gated = gated_config(vllm_config) is not None
        if not is_gated and split_config(vllm_config) is None:
            raise RlkvError(
                "--attention-backend CUSTOM is the split KV cache of rlkv_vllm and no head profile "
                'is given: add additional_config={"rlkv": {"profile": ...}} (rlkv serve --profile) '
                "or remove the flag"
            )
        forget_backend_choice()
        return GatedCUDAImpl if is_gated else SplitCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[CUDAMetadataBuilder]:
        return CUDAMetadataBuilder
