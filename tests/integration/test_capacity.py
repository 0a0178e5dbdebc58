"""Blocks and bytes of a real-size split cache, counted in vLLM's own managers without weights."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.request import Request

from rlkv_vllm.engine.cache.head_cache import HeadCacheLayer, register_head_caches
from rlkv_vllm.engine.cache.specs import RingSpec
from rlkv_vllm.engine.config import SplitPlan, split_plan
from rlkv_vllm.engine.cpu.backend import SplitCPUBackend
from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.plugin import register
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.profile.schema import HeadProfile, Provenance

register()
init_none_hash(sha256)

LAYERS, HEADS, HEAD_DIM, SINK, WINDOW = 28, 8, 128, 16, 64
POOL = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of real size, without weights."""
    path = tmp_path_factory.mktemp("real-size")
    config = Qwen3Config(
        num_hidden_layers=LAYERS,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=16,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        vocab_size=512,
        max_position_embeddings=32768,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(path)
    return path


@dataclass
class Pool:
    """vLLM's cache of one rank: grouping, memory layout and block manager."""

    vllm_config: VllmConfig
    plan: SplitPlan | None
    cache: KVCacheConfig

    def manager(self, chunk: int, *, caching: bool = False) -> KVCacheManager:
        block_size = self.cache.kv_cache_groups[0].kv_cache_spec.block_size
        return KVCacheManager(
            self.cache,
            max_model_len=self.vllm_config.model_config.max_model_len,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            max_in_flight_tokens=chunk,
            enable_caching=caching,
        )

    @property
    def block_bytes(self) -> int:
        return self.cache.kv_cache_tensors[0].size // self.cache.num_blocks


def make_pool(
    model: Path, folder: Path, sparsity: float | None, *, memory: int = POOL, **options: Any
) -> Pool:
    """What the engine core would make of the specs of a rank."""
    additional: dict[str, Any] = {}
    if sparsity is not None:
        rng = random.Random(0)
        profile = HeadProfile(
            model=load_model_fingerprint(str(model)),
            # Squared and scaled by layer: uneven, some layers without full heads.
            gates=[
                [rng.random() ** 2 * (0.2 + layer % 5) / 4.2 for _ in range(HEADS)]
                for layer in range(LAYERS)
            ],
            sink=SINK,
            window=WINDOW,
            provenance=Provenance(method="test", created=date(2026, 11, 23)),
        )
        path = folder / "profile.json"
        save_profile(profile, path)
        additional = {"rlkv": {"profile": str(path), "sparsity": sparsity}}
    vllm_config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=8192,
        additional_config=additional,
        **options,
    ).create_engine_config()
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    plan = split_plan(vllm_config)
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.attn"
        if plan is None:
            specs[name] = FullAttentionSpec(
                block_size=vllm_config.cache_config.block_size,
                num_kv_heads=HEADS,
                head_size=HEAD_DIM,
                dtype=torch.bfloat16,
            )
        else:
            attention = SimpleNamespace(
                get_attn_backend=lambda: SplitCPUBackend,
                num_heads=16,
                head_size=HEAD_DIM,
                kv_cache_torch_dtype=torch.bfloat16,
            )
            register_head_caches(plan, vllm_config, name, attention, rank=0)
    context = vllm_config.compilation_config.static_forward_context
    specs |= {n: c.spec for n, c in context.items() if isinstance(c, HeadCacheLayer)}
    (cache,) = get_kv_cache_configs(vllm_config, [specs], [memory])
    return Pool(vllm_config, plan, cache)


def make_request(name: str, num_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=1000),
        pooling_params=None,
    )


def in_use(manager: KVCacheManager) -> int:
    return manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks()


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 0.9])
def test_vllm_makes_exactly_the_planned_groups(
    sparsity: float, model: Path, tmp_path: Path
) -> None:
    pool = make_pool(model, tmp_path, sparsity)
    assert pool.plan is not None
    groups = pool.cache.kv_cache_groups
    assert len(groups) == 1 + pool.plan.groups.num_ring_groups
    assert {len(g.layer_names) for g in groups} == {pool.plan.groups.pages_per_block(0)}
    assert pool.block_bytes == pool.plan.forecast.block_bytes(0)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("chunk", [512, 4000])
def test_bytes_of_a_request_are_the_ideal_prefill_included(
    sparsity: float, chunk: int, model: Path, tmp_path: Path
) -> None:
    pool = make_pool(model, tmp_path, sparsity)
    assert pool.plan is not None
    manager = pool.manager(chunk, caching=False)
    request = make_request("a", 4000)
    peak = steady = 0
    while request.num_computed_tokens < 4096:
        manager.new_step_starts()
        new = min(chunk, max(4000 - request.num_computed_tokens, 0)) or 1
        if new == 1:
            request.append_output_token_ids(0)
        assert manager.allocate_slots(request, new) is not None
        manager.take_new_block_ids()
        peak = max(peak, in_use(manager))
        request.num_computed_tokens += new
        steady = in_use(manager) if request.num_computed_tokens > 4001 else 0
    forecast = pool.plan.forecast
    assert steady <= forecast.blocks_per_request(4096) <= steady + pool.plan.groups.num_ring_groups
    # Ideal: whole blocks, but no padding between groups.
    assert peak * pool.block_bytes <= 1.03 * forecast.ideal_bytes_per_request(4096, 0)
    # Against bare tokens, of which a ring's first and last block are half empty.
    streaming = round(sparsity * LAYERS * HEADS)
    tokens = (LAYERS * HEADS - streaming) * 4096 + streaming * (SINK + WINDOW)
    assert peak * pool.block_bytes <= 1.04 * tokens * 2 * HEAD_DIM * 2
    manager.free(request)
    assert in_use(manager) == 0


def admitted(pool: Pool, num_tokens: int, chunk: int = 2048) -> int:
    """Requests that run at once when each is prefilled and kept at ``num_tokens``."""
    manager = pool.manager(chunk)
    count = 0
    while True:
        request = make_request(str(count), num_tokens)
        while request.num_computed_tokens < num_tokens:
            manager.new_step_starts()
            new = min(chunk, num_tokens - request.num_computed_tokens)
            if manager.allocate_slots(request, new, full_sequence_must_fit=True) is None:
                return count
            manager.take_new_block_ids()
            request.num_computed_tokens += new
        # The step after the prefill gives the last chunk's leftovers back.
        manager.coordinator.remove_skipped_blocks(request.request_id, num_tokens, num_tokens)
        count += 1


def test_half_streaming_heads_nearly_double_the_requests_at_once(
    model: Path, tmp_path: Path
) -> None:
    stock = admitted(make_pool(model, tmp_path, None, memory=16 * POOL), 4096)
    pool = make_pool(model, tmp_path, 0.5, memory=16 * POOL)
    split = admitted(pool, 4096)
    assert split >= 1.85 * stock
    assert pool.plan is not None
    # The forecast counts the worst alignment of the window with the blocks.
    assert 0 <= split - pool.plan.forecast.requests_in(pool.cache.num_blocks, 4096) <= 1


def test_forecast_of_admission_is_the_specs(model: Path, tmp_path: Path) -> None:
    pool = make_pool(model, tmp_path, 0.8)
    assert pool.plan is not None
    caps = [
        spec.max_admission_blocks_per_request(512, 4096)
        for spec in (group.kv_cache_spec for group in pool.cache.kv_cache_groups)
        if isinstance(spec, RingSpec)
    ]
    geometry = pool.plan.geometry
    assert pool.plan.forecast.admission_blocks(4096) == 4096 // geometry.block_size + sum(caps)


def test_report_agrees_with_the_pool(model: Path, tmp_path: Path) -> None:
    pool = make_pool(model, tmp_path, 0.5)
    assert pool.plan is not None
    report = SplitReport.of(pool.plan, 0, pool.cache.num_blocks)
    assert report.cache_bytes == pool.cache.kv_cache_tensors[0].size
    assert report.full_heads == report.streaming_heads == LAYERS * HEADS // 2
    assert report.bytes_per_token * 2 == report.full_bytes_per_token
    assert SplitReport.from_dict(asdict(report)) == report


def test_tensor_parallel_ranks_get_equal_groups(model: Path, tmp_path: Path) -> None:
    pool = make_pool(model, tmp_path, 0.5)
    assert pool.plan is not None
    from rlkv_vllm.allocation.forecast import forecast_split

    forecast = forecast_split(pool.plan.profile.gates, 0.5, pool.plan.geometry, tp_size=2)
    assert forecast.block_bytes(0) == forecast.block_bytes(1)


@pytest.mark.parametrize(
    ("block_size", "sparsity", "expected"), [(None, 0.5, 32), (None, 0.8, 16), (64, 0.5, 64)]
)
def test_block_size_is_chosen_for_the_user(
    block_size: int | None, sparsity: float, expected: int, model: Path, tmp_path: Path
) -> None:
    options = {} if block_size is None else {"block_size": block_size}
    pool = make_pool(model, tmp_path, sparsity, **options)
    assert pool.plan is not None
    assert pool.plan.geometry.block_size == expected
