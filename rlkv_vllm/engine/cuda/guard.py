"""Stand-ins for vLLM's CUDA backends, so that a split or gated model never runs on one of them.

vLLM chooses an attention backend without asking plugins. So each decoder backend that CUDA may
choose is replaced by a subclass of it. For a model with ``additional_config["rlkv"]`` the subclass
gives two other answers: to automatic selection it names our backend, and it refuses to give an
attention implementation. For any other model it behaves as vLLM's class. Goes when a plugin can
choose the backend of a model.

The classes are made when they are asked for by name (PEP 562): a backend whose package is not
installed must fail where vLLM expects it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rlkv_vllm.engine.config import gated_config, split_config
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

GUARDED = (
    "FLASH_ATTN",
    "FLASHINFER",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "TURBOQUANT",
    "ULTRAQUANT",
    "TRITON_FLASH_ATTN",
    "TRITON_FLASHINFER",
    "B12X",
    "HPC_ATTN",
)


def register_guards() -> None:
    """Register our backend as CUSTOM, and a guard for every backend that CUDA may choose."""
    register_backend(AttentionBackendEnum.CUSTOM, "rlkv_vllm.engine.cuda.backend.SplitCUDABackend")
    for name in GUARDED:
        backend = AttentionBackendEnum[name]
        if not backend.is_overridden():  # another plugin's backend refuses by itself or not at all
            register_backend(backend, f"{__name__}.{name}")


def _is_ours() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and bool(split_config(config) or gated_config(config))


def _guard(name: str) -> type[AttentionBackend]:
    stock: Any = resolve_obj_by_qualname(AttentionBackendEnum[name].value)

    class Guard(stock):
        __doc__ = f"vLLM's {name}; refuses a model that is to be split or gated."

        @classmethod
        def _is_redirected(cls) -> bool:
            config = get_current_vllm_config_or_none()
            return (
                config is not None
                and _is_ours()
                and config.attention_config.backend is None
                and not config.attention_config.backend_per_kind
            )

        @classmethod
        def full_cls_name(cls) -> tuple[str, str]:
            if cls._is_redirected():
                return _split_backend().full_cls_name()
            return super().full_cls_name()

        @classmethod
        def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
            if cls._is_redirected():
                return _split_backend().validate_configuration(*args, **kwargs)
            return super().validate_configuration(*args, **kwargs)

        @classmethod
        def get_impl_cls(cls) -> Any:
            if _is_ours():
                raise RlkvError(
                    f"split and gated models do not run on attention backend {name}: "
                    "give --attention-backend CUSTOM (LLM(..., attention_backend='CUSTOM')) or none"
                )
            return super().get_impl_cls()

    Guard.__name__ = Guard.__qualname__ = name
    Guard.__module__ = __name__
    return Guard


def _split_backend() -> type[AttentionBackend]:
    from rlkv_vllm.engine.cuda.backend import SplitCUDABackend

    return SplitCUDABackend


def __getattr__(name: str) -> Any:
    if name not in GUARDED:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    guard = globals()[name] = _guard(name)
    return guard
