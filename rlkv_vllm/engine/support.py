"""What the split cache and gated mode do not support: refused at start-up, never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Ampere: bfloat16, and the asynchronous copies that Triton's pipelining needs.
MIN_CUDA_CAPABILITY = (8, 0)

#: Head dimensions that the GPU kernels are tested with.
CUDA_HEAD_DIMS = (32, 64, 96, 128, 256)

#: 8-bit floats of one scale per layer for keys and one for values.
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")


class Refusal(NamedTuple):
    """An unsupported feature and its flag, whether a configuration uses it, and what to do."""

    what: str
    used: Callable[[VllmConfig], object]
    fix: str = "remove the flag"


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def platform_problem() -> str:
    """What is wrong with this machine's platform, or nothing."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return ""
    if not current_platform.is_cuda():
        return f"platform {current_platform.device_type}"
    if not current_platform.has_device_capability(MIN_CUDA_CAPABILITY):
        major, minor = MIN_CUDA_CAPABILITY
        return f"GPUs of a compute capability below {major}.{minor}"
    return ""


def _wants_another_layout(_: VllmConfig) -> bool:
    from vllm import envs

    # NHD is vLLM's earlier name.
    return _is_cuda() and envs.VLLM_KV_CACHE_LAYOUT not in (None, "LBNHC", "NHD")


def _uses_another_backend(config: VllmConfig) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not _is_cuda():
        return False
    attention, allowed = config.attention_config, (None, AttentionBackendEnum.CUSTOM)
    return bool(attention.backend_per_kind or attention.backend not in allowed)


def _cache_is_fp8(config: VllmConfig) -> bool:
    return config.cache_config.cache_dtype in FP8_CACHE_DTYPES


def cache_is_the_models(config: VllmConfig) -> bool:
    """Whether the KV cache has the type of the model."""
    model_dtype = str(config.model_config.dtype).removeprefix("torch.")
    return config.cache_config.cache_dtype in ("auto", model_dtype)


def _cpu_has_no_fp8_cache(config: VllmConfig) -> bool:
    import torch

    if not (_cache_is_fp8(config) and _is_cpu()):
        return False
    has_kernel = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    return config.model_config.get_head_size() % 32 != 0 or not has_kernel


def _has_sliding_window(config: VllmConfig) -> bool:
    text = config.model_config.hf_text_config
    layer_types = getattr(text, "layer_types", None) or ()
    if "sliding_attention" in layer_types:
        return True
    uses_it = getattr(text, "use_sliding_window", True)
    return bool(uses_it and getattr(text, "sliding_window", None) and not layer_types)


_STOCK = "serve the model with plain vLLM"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "this platform (neither a CPU nor an NVIDIA GPU of compute capability 8.0 or more)",
        lambda _: platform_problem(),
        "install rlkv_vllm[cpu] and serve on the CPU, or start without --profile",
    ),
    Refusal("--attention-backend other than CUSTOM, or one per kind", _uses_another_backend),
    Refusal(
        f"head dimensions other than {', '.join(map(str, CUDA_HEAD_DIMS))} on a GPU",
        lambda c: _is_cuda() and c.model_config.get_head_size() not in CUDA_HEAD_DIMS,
        _STOCK,
    ),
    Refusal("--enable-sleep-mode", lambda c: c.model_config.enable_sleep_mode),
    Refusal(
        "--enable-dbo, --ubatch-size (micro-batches)", lambda c: c.parallel_config.use_ubatching
    ),
    Refusal(
        "--pipeline-parallel-size > 1",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "use --tensor-parallel-size",
    ),
    Refusal(
        "--data-parallel-size > 1",
        lambda c: c.parallel_config.data_parallel_size > 1,
        "run one server per replica behind a load balancer",
    ),
    Refusal(
        "--distributed-executor-backend ray",
        lambda c: c.parallel_config.distributed_executor_backend == "ray",
        "use mp, vLLM's own processes on one machine",
    ),
    Refusal(
        "VLLM_USE_V2_MODEL_RUNNER on the CPU",
        lambda c: _is_cpu() and c.use_v2_model_runner,
        "set it to 0",
    ),
    Refusal(
        "--decode-context-parallel-size / --prefill-context-parallel-size > 1",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1
            or c.parallel_config.prefill_context_parallel_size > 1
        ),
    ),
    Refusal(
        "--speculative-config with another method than ngram (drafters with a cache of their own)",
        lambda c: c.speculative_config is not None and c.speculative_config.method != "ngram",
        'use {"method": "ngram", ...} or remove the flag',
    ),
    Refusal(
        "--speculative-config on a GPU",
        lambda c: c.speculative_config is not None and _is_cuda(),
        "remove the flag: it has been shown to be exact on the CPU only",
    ),
    Refusal("--enable-lora", lambda c: c.lora_config, "merge the adapter into the weights"),
    Refusal("--kv-transfer-config (KV connectors and offloading)", lambda c: c.kv_transfer_config),
    Refusal(
        "--kv-cache-dtype other than the model's own and fp8, fp8_e4m3, fp8_e5m2",
        lambda c: not (cache_is_the_models(c) or _cache_is_fp8(c)),
    ),
    Refusal(
        "--kv-cache-dtype fp8 on a GPU",
        lambda c: _cache_is_fp8(c) and _is_cuda(),
        "remove the flag: the Triton kernels read no 8-bit caches",
    ),
    Refusal(
        "--kv-cache-dtype fp8 on a CPU without AVX-512, or with head dimensions that are no "
        "multiple of 32",
        _cpu_has_no_fp8_cache,
        "remove the flag: vLLM's kernel does not take it",
    ),
    Refusal("--kv-sharing-fast-prefill", lambda c: c.cache_config.kv_sharing_fast_prefill),
    Refusal(
        "--max-model-len auto (the packing of the heads depends on it)",
        lambda c: c.model_config.original_max_model_len == -1,
        "give a number; `rlkv profile plan` shows what fits",
    ),
    Refusal(
        "--disable-hybrid-kv-cache-manager (rings would be given full caches)",
        lambda c: c.scheduler_config.disable_hybrid_kv_cache_manager,
    ),
    Refusal("encoder-decoder models", lambda c: c.model_config.is_encoder_decoder, _STOCK),
    Refusal("multimodal models", lambda c: c.model_config.is_multimodal_model, _STOCK),
    Refusal(
        "models with state-space layers or without attention",
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        _STOCK,
    ),
    Refusal("diffusion language models", lambda c: c.model_config.is_diffusion, _STOCK),
    Refusal("multi-head latent attention (MLA) models", lambda c: c.model_config.use_mla, _STOCK),
    Refusal("models with their own sliding-window layers", _has_sliding_window, _STOCK),
    Refusal(
        "pooling models (embeddings, scoring)",
        lambda c: c.model_config.runner_type != "generate",
        _STOCK,
    ),
)

#: What gated mode refuses beyond :data:`REFUSALS`.
GATED_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--dtype float16 on the CPU",
        lambda c: _is_cpu() and str(c.model_config.dtype) == "torch.float16",
        "use float32 or bfloat16",
    ),
    Refusal(
        "VLLM_KV_CACHE_LAYOUT other than LBNHC on a GPU",
        _wants_another_layout,
        "remove the variable",
    ),
    Refusal("--kv-cache-dtype other than the model's own", lambda c: not cache_is_the_models(c)),
    Refusal(
        "--speculative-config",
        lambda c: c.speculative_config is not None,
        "remove the flag: it has not been shown to be exact",
    ),
)

#: Properties of an attention layer, by the argument of vLLM's `AttentionImpl`.
LAYER_REFUSALS: dict[str, str] = {
    "alibi_slopes": "ALiBi slopes",
    "sliding_window": "a sliding window of its own",
    "logits_soft_cap": "a logits soft-cap",
    "sinks": "learned attention sinks",
    "kv_sharing_target_layer_name": "a KV cache shared with another layer",
}


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that the split cache cannot serve exactly."""
    _check("the split KV cache", REFUSALS, vllm_config)


def check_gated_supported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration in which gates would not act exactly."""
    _check("gated mode", (*GATED_REFUSALS, *REFUSALS), vllm_config)


def _check(who: str, refusals: tuple[Refusal, ...], vllm_config: VllmConfig) -> None:
    for refusal in refusals:
        if refusal.used(vllm_config):
            raise RlkvError(f"{who} does not support {refusal.what}: {refusal.fix}")


def check_layer_supported(
    num_heads: int,
    head_size: int,
    scale: float,
    num_kv_heads: int | None = None,
    alibi_slopes: object | None = None,
    sliding_window: object | None = None,
    kv_cache_dtype: str = "auto",
    logits_soft_cap: float | None = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    sinks: object | None = None,
    **unknown: object,
) -> None:
    """Refuse an attention layer whose arithmetic our implementations do not have.

    Takes what vLLM constructs every `AttentionImpl` with.
    """
    given = {
        "alibi_slopes": alibi_slopes,
        "sliding_window": sliding_window,
        "logits_soft_cap": logits_soft_cap or None,
        "sinks": sinks,
        "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
    }
    problems = [LAYER_REFUSALS[name] for name, value in given.items() if value is not None]
    if attn_type != "decoder":
        problems.append(f"attention type {attn_type}")
    if other := [name for name, value in unknown.items() if value is not None]:
        problems.append(f"options of their own ({', '.join(other)})")
    if problems:
        raise RlkvError(
            f"the split KV cache does not support attention layers with {problems[0]}: {_STOCK}"
        )


def check_layer_shape(layer: Any, expected: tuple[int, int], dtypes: str = "") -> None:
    """Refuse an attention layer that is not like all others of the model.

    `expected`: KV heads per rank and head dimension; `dtypes`: model's and cache's if they differ.
    """
    problem = ""
    if type(layer).__name__ != "Attention":  # subclasses mask differently
        problem = f"attention layers of class {type(layer).__name__}"
    elif (layer.num_kv_heads, layer.head_size) != expected:
        problem = (
            f"models whose layers differ in shape: one has {layer.num_kv_heads} KV heads of "
            f"{layer.head_size}, expected {expected[0]} of {expected[1]}"
        )
    elif dtypes:
        problem = f"a cache of another type than the model ({dtypes})"
    if problem:
        raise RlkvError(f"the split KV cache does not support {problem}: {_STOCK}")
