"""What the split cache does not support is refused before any weights load."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from rlkv_vllm.allocation import allocate
from rlkv_vllm.engine.config import gated_config, split_config, split_plan
from rlkv_vllm.engine.support import (
    REFUSALS,
    check_layer_shape,
    check_layer_supported,
    check_supported,
)
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.plugin import register
from rlkv_vllm.profile.io import load_profile, save_profile
from rlkv_vllm.serving.preflight import split_options
from tests.integration.test_parity import UNEVEN
from tests.support.profiles import assert_one_line, measured_row

register()


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def profile(model: Path, profile_of: Callable[..., Path]) -> Path:
    return profile_of(model, UNEVEN, sink=16, window=64)


def config(model: Path, split: object, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=1024,
        additional_config={"rlkv": split} if split is not None else {},
        **({"dtype": "float32"} | options),
    ).create_engine_config()


def test_unconfigured_is_no_plan(model: Path) -> None:
    assert split_config(config(model, None)) is None
    assert split_plan(config(model, None)) is None


def test_configured_is_a_plan(model: Path, profile: Path) -> None:
    plan = split_plan(config(model, {"profile": str(profile)}))
    assert plan is not None
    assert plan.groups.allocation.full == UNEVEN
    assert (plan.geometry.sink, plan.geometry.window) == (16, 64)


def test_sink_window_and_sparsity_override_the_profile(model: Path, profile: Path) -> None:
    split = {"profile": str(profile), "sparsity": 1.0, "sink": 3, "window": 40}
    plan = split_plan(config(model, split))
    assert plan is not None
    assert plan.groups.allocation.num_full == 0
    assert (plan.geometry.sink, plan.geometry.window) == (3, 40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype other than"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 64}},
            "num_speculative_tokens 64: a draft must be shorter than the window",
        ),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 3}},
            "another method than ngram",
        ),
        ({"block_size": 24}, "--block-size 24"),
        ({"block_size": 48, "kv_cache_dtype": "fp8"}, "--block-size 48.* multiple of 32"),
        ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"kv_offloading_size": 1}, "--kv-transfer-config"),
    ],
)
def test_unsupported_flags(options: dict[str, Any], words: str, model: Path, profile: Path) -> None:
    vllm_config = config(model, {"profile": str(profile)}, **options)
    with pytest.raises(RlkvError, match=words) as error:
        split_plan(vllm_config)
    assert "\n" not in str(error.value)


def test_a_cpu_without_a_cache_of_8_bits(
    model: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config = config(model, {"profile": str(profile)}, kv_cache_dtype="fp8")
    plan = split_plan(vllm_config)
    assert plan is not None
    assert (plan.geometry.dtype_bytes, plan.geometry.block_size % 32) == (1, 0)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    with pytest.raises(RlkvError, match="without AVX-512"):
        split_plan(vllm_config)


def test_drafters_with_a_cache_of_their_own(model: Path, profile: Path) -> None:
    draft = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    with pytest.raises(RlkvError, match="another method than ngram"):
        split_plan(config(model, {"profile": str(profile)}, speculative_config=draft))


@pytest.mark.parametrize(
    "what",
    [
        "encoder-decoder",
        "multimodal",
        "state-space",
        "diffusion",
        "MLA",
        "pooling",
        "kv-transfer",
        "context-parallel",
        "sliding-window",
        "--max-model-len auto",
        "micro-batches",
        "--data-parallel-size",
        "ray",
        "VLLM_USE_V2_MODEL_RUNNER",
    ],
)
def test_unsupported_models_and_modes(what: str, model: Path, profile: Path) -> None:
    """Each refusal fires on the one property it is about."""
    real = config(model, {"profile": str(profile)})
    check_supported(real)
    flags = {
        "is_encoder_decoder": what == "encoder-decoder",
        "is_multimodal_model": what == "multimodal",
        "is_hybrid": what == "state-space",
        "is_attention_free": False,
        "is_diffusion": what == "diffusion",
        "use_mla": what == "MLA",
        "enable_sleep_mode": False,
        "original_max_model_len": -1 if what == "--max-model-len auto" else 1024,
        "dtype": real.model_config.dtype,
        "runner_type": "pooling" if what == "pooling" else "generate",
        "hf_text_config": SimpleNamespace(sliding_window=4096)
        if what == "sliding-window"
        else real.model_config.hf_text_config,
    }
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=2 if what == "context-parallel" else 1,
        use_ubatching=what == "micro-batches",
        data_parallel_size=2 if what == "--data-parallel-size" else 1,
        distributed_executor_backend="ray" if what == "ray" else "mp",
    )
    fake: Any = SimpleNamespace(
        model_config=SimpleNamespace(**flags),
        parallel_config=parallel,
        cache_config=real.cache_config,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        lora_config=None,
        use_v2_model_runner=what == "VLLM_USE_V2_MODEL_RUNNER",
        kv_transfer_config=object() if what == "kv-transfer" else None,
    )
    with pytest.raises(RlkvError, match=what):
        check_supported(fake)


def test_unsupported_platforms(model: Path, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = config(model, {"profile": str(profile)})
    monkeypatch.setattr("rlkv_vllm.engine.support.platform_problem", lambda: "platform xpu")
    with pytest.raises(RlkvError, match="this platform"):
        split_plan(vllm_config)


def test_sleep_mode_is_vllms_to_refuse(model: Path, profile: Path) -> None:
    with pytest.raises(ValueError, match=r"[Ss]leep mode"):
        config(model, {"profile": str(profile)}, enable_sleep_mode=True)


def test_vllms_retention_interval_wins(model: Path, profile: Path) -> None:
    split = {"profile": str(profile), "retention_interval": 128}
    for options, expected in (({}, 128), ({"prefix_cache_retention_interval": 512}, 512)):
        plan = split_plan(config(model, split, **options))
        assert plan is not None
        assert plan.retention_interval == expected


def test_every_refusal_says_what_to_do() -> None:
    assert all(refusal.what and refusal.fix for refusal in REFUSALS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alibi_slopes": [0.1]}, "ALiBi"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft-cap"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sinks": object()}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.attn"}, "shared"),
        ({"block_n": 64}, r"options of their own \(block_n\)"),
    ],
)
def test_unsupported_layers(change: dict[str, Any], words: str) -> None:
    plain: dict[str, Any] = {"alibi_slopes": None, "kv_cache_dtype": "auto", "block_n": None}
    check_layer_supported(8, 64, 0.125, 4, **plain)
    with pytest.raises(RlkvError, match=words):
        check_layer_supported(8, 64, 0.125, 4, **(plain | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_class": "ChunkedLocalAttention"}, "ChunkedLocalAttention"),
        ({"num_kv_heads": 2}, "differ in shape"),
        ({"head_size": 64}, "differ in shape"),
        ({"dtypes": "torch.float32, cache torch.bfloat16"}, "another type"),
    ],
)
def test_layers_unlike_the_others(change: dict[str, Any], words: str) -> None:
    def check(layer_class: str = "Attention", dtypes: str = "", **shape: int) -> None:
        layer = type(layer_class, (), {"num_kv_heads": 4, "head_size": 32} | shape)()
        check_layer_shape(layer, (4, 32), dtypes)

    check()
    with pytest.raises(RlkvError, match=words):
        check(**change)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("embedded", "must be an object"),
        ({}, "profile"),
        ({"profile": "{profile}", "sparsity": 1.5}, "sparsity 1.5"),
        ({"profile": "{profile}", "sink": -1}, "sink -1"),
        ({"profile": "{profile}", "window": 0}, "window 0"),
        ({"profile": "x", "window": "wide"}, "window"),
        ({"profile": "x", "sinks": 3}, "sinks"),
        ({"profile": "/nowhere/profile.json"}, "/nowhere/profile.json"),
    ],
)
def test_bad_additional_config(split: Any, words: str, model: Path, profile: Path) -> None:
    if isinstance(split, dict) and split.get("profile") == "{profile}":
        split |= {"profile": str(profile)}
    vllm_config = config(model, split)
    with pytest.raises(RlkvError, match=words) as error:
        split_plan(vllm_config)
    assert "\n" not in str(error.value)


def test_profile_of_another_model(checkpoint: Callable[[str], Path], profile: Path) -> None:
    with pytest.raises(RlkvError, match="qwen3"):
        split_plan(config(checkpoint("llama"), {"profile": str(profile)}))


def test_profile_replaced_since_the_server_checked_it(
    model: Path, profile: Path, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    original = load_profile(profile)
    save_profile(original, path)
    flags = dict.fromkeys(("sink", "window", "revision", "max_loss", "evidence"))
    flags |= dict.fromkeys(("tensor_parallel_size", "kv_cache_dtype"))
    split = split_options(
        Namespace(model=str(model), model_name="m", profile=str(path), sparsity=0.5, **flags)
    )
    assert split_plan(config(model, split)) is not None
    save_profile(original.model_copy(update={"window": 65}), path)
    with pytest.raises(RlkvError) as caught:
        split_plan(config(model, split))
    assert_one_line(caught.value, f"--profile {path}: changed since", "restart the server")


def test_no_known_sparsity(model: Path, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(load_profile(profile).model_copy(update={"recommended_sparsity": None}), path)
    with pytest.raises(RlkvError, match="--sparsity"):
        split_plan(config(model, {"profile": str(path)}))


def test_a_budget_takes_rows_of_what_is_served(model: Path, profile: Path, tmp_path: Path) -> None:
    """Which ranks, and which type of the KV cache, only the engine's configuration says."""
    path, original = tmp_path / "profile.json", load_profile(profile)
    # Of every two heads the first is full: two ranks serve other heads.
    gates = [[0.9 - 0.5 * (head * 2 // len(row)) for head in range(len(row))]
             for row in original.gates]  # fmt: skip
    uneven = original.model_copy(update={"gates": gates})
    rows = [measured_row(0.5, lost=0, profile=uneven)]
    save_profile(uneven.model_copy(update={"evaluation": rows}), path)
    split = {"profile": str(path), "max_loss": 0.01}
    plan = split_plan(config(model, split, kv_cache_dtype="auto"))
    assert plan is not None
    assert plan.within is not None
    assert plan.sparsity == plan.within.sparsity == 0.5
    assert plan.groups.allocation.full == allocate(gates, 0.5).full
    for options, words in (
        ({"tensor_parallel_size": 2}, ["that of --tensor-parallel-size 1", "-size 2`"]),
        ({"kv_cache_dtype": "fp8"}, ["another KV cache type", "--kv-cache-dtype fp8`"]),
    ):
        with pytest.raises(RlkvError) as error:
            split_plan(config(model, split, **options))
        assert_one_line(error.value, *words)
    for wrong, word in (
        ({"sparsity": 0.5}, "remove one of them"),
        ({"max_loss": 1}, "did you mean 1%"),
        ({"evidence": "guessed"}, "evidence: Input should be"),
        ({"window": 65}, "another sink or window"),
    ):
        with pytest.raises(RlkvError, match=word):
            split_plan(config(model, split | wrong))


@pytest.mark.parametrize(
    ("options", "rlkv", "words"),
    [
        ({}, {"sink": -1}, "sink: Input should be"),
        ({}, {"profile": "embedded"}, "profile: Extra inputs"),
        ({"dtype": "float16"}, {}, "--dtype float16"),
        ({"kv_cache_dtype": "fp8"}, {}, "--kv-cache-dtype"),
        ({"pipeline_parallel_size": 2}, {}, "--pipeline-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
            {},
            "--speculative-config",
        ),
    ],
)
def test_gated_mode_refuses(
    options: dict[str, Any], rlkv: dict[str, Any], words: str, model: Path
) -> None:
    with pytest.raises(RlkvError, match=words):
        gated_config(config(model, {"mode": "gated"} | rlkv, **options))
