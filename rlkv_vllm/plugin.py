"""Entry point of vLLM's general plugins; imports everything lazily."""


def register() -> None:
    """Register the split cache with vLLM; runs in every process, may run twice.

    Without ``additional_config["rlkv"]`` nothing changes: every registered class then does what
    vLLM's own does.
    """
    from rlkv_vllm.engine.compat import (
        check_vllm_version,
        exit_without_collecting,
        register_builtin_cache_specs,
    )

    check_vllm_version()
    register_builtin_cache_specs()
    exit_without_collecting()

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from rlkv_vllm.engine.cache.ring_manager import RingManager
    from rlkv_vllm.engine.cache.specs import RingSpec
    from rlkv_vllm.engine.cuda.guard import register_guards

    KVCacheSpecRegistry.register(RingSpec, RingManager, uniform_type_base_spec=RingSpec)
    register_backend(AttentionBackendEnum.CPU_ATTN, "rlkv_vllm.engine.cpu.backend.SplitCPUBackend")
    register_guards()
