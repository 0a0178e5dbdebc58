"""The CUDA backend against vLLM's own functions for CUDA, as far as they run without a GPU."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import vllm.platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.selector import _cached_get_attn_backend, get_attn_backend
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    get_kv_cache_spec,
    init_attn_backend,
    init_kv_cache,
)
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.utils import clear_layer_kv_caches

from rlkv_vllm.engine.cache import split_layer
from rlkv_vllm.engine.cache.specs import RingSpec
from rlkv_vllm.engine.config import gated_config, split_plan
from rlkv_vllm.engine.cuda import layer as cuda_layer
from rlkv_vllm.engine.cuda import metadata as cuda_metadata
from rlkv_vllm.engine.cuda.backend import SplitCUDABackend
from rlkv_vllm.engine.cuda.layer import SplitCUDAImpl
from rlkv_vllm.engine.gated import cuda as gated_cuda
from rlkv_vllm.engine.gated import layer as gated_layer
from rlkv_vllm.engine.gated.cuda import GatedCUDAImpl
from rlkv_vllm.engine.support import check_supported
from rlkv_vllm.engine.worker_extension import RlkvWorkerExtension
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.kernels.triton.layer_cache import OFFSET_UNIT
from rlkv_vllm.plugin import register
from tests.support.checkpoints import make_checkpoint

register()

CPU = torch.device("cpu")
#: As in test_cuda_backend: one kernel call in the first layer, two in the second.
FULL_HEADS = ((0, 2), ())
NUM_Q, NUM_KV, HEAD_DIM, BLOCK = 6, 3, 32, 16
GATED = {"mode": "gated", "sink": 16, "window": 33}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        "qwen3",
        tmp_path_factory.mktemp("parts") / "qwen3",
        num_hidden_layers=2,
        num_attention_heads=NUM_Q,
        num_key_value_heads=NUM_KV,
    )


@pytest.fixture(scope="module")
def profile(model: Path, profile_of: Callable[..., Path]) -> Path:
    return profile_of(model, FULL_HEADS, sink=16, window=33)


def make_config(model: Path, rlkv: dict[str, Any] | None, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=BLOCK,
        additional_config={} if rlkv is None else {"rlkv": rlkv},
        **options,
    ).create_engine_config()


class Model:
    """The attention layers of a model under the functions of vLLM's V2 model runner."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        vllm_config.cache_config.kv_cache_layout = "LBNHC"
        # Models are built with a type of their own as the default.
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
            self.layers = [
                Attention(
                    NUM_Q,
                    HEAD_DIM,
                    HEAD_DIM**-0.5,
                    NUM_KV,
                    cache_config=vllm_config.cache_config,
                    prefix=f"model.layers.{i}.self_attn.attn",
                    attn_backend=SplitCUDABackend,
                )
                for i in range(2)
            ]
            for layer in self.layers:
                layer.process_weights_after_loading(torch.float32)
        self.context = vllm_config.compilation_config.static_forward_context
        self.init_cache(1 << 20)

    def init_cache(self, memory: int) -> None:
        specs = get_kv_cache_spec(self.vllm_config)
        (self.cache,) = get_kv_cache_configs(self.vllm_config, [specs], [memory])
        self.groups, self.support, block_sizes = init_attn_backend(
            self.cache, self.vllm_config, CPU
        )
        assert set(block_sizes) == {BLOCK}
        init_kv_cache(
            self.context,
            self.cache,
            CPU,
            block_sizes,
            self.vllm_config,
            attn_groups=(g for groups in self.groups for g in groups),
        )

    @property
    def impls(self) -> list[Any]:
        return [layer.impl for layer in self.layers]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    make_workspace = cuda_metadata._shared_workspace
    monkeypatch.setattr(
        cuda_metadata,
        "_shared_workspace",
        lambda **sizes: make_workspace(**sizes, target_programs=8, capability=90),
    )
    for module in (split_layer, gated_layer):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)


@pytest.fixture
def split(model: Path, profile: Path, one_rank: None) -> Model:
    return Model(make_config(model, {"profile": str(profile)}))


@pytest.fixture
def gated(model: Path, one_rank: None) -> Model:
    return Model(make_config(model, GATED))


def make_metadata(
    split: Model, num_reqs: int, num_tokens: int, *, max_query_len: int, capture: bool
) -> tuple[dict[str, Any], list[torch.Tensor], torch.Tensor]:
    """Metadata of a dummy batch, with the tables and slots it is made of."""
    buffers = InputBuffers(max_num_reqs=8, max_num_tokens=64, device=CPU)
    batch = InputBatch.make_dummy(num_reqs, num_tokens, buffers, max_query_len=max_query_len)
    groups = len(split.cache.kv_cache_groups)
    tables = [torch.full((num_reqs, 16), i, dtype=torch.int32) for i in range(groups)]
    slots = torch.arange(groups)[:, None].expand(groups, 64) - 1
    metadata = build_attn_metadata(
        split.groups,
        num_reqs,
        num_tokens,
        batch.query_start_loc,
        torch.from_numpy(batch.query_start_loc_np),
        max_query_len,
        batch.seq_lens,
        256,
        tables,
        slots[:, :num_tokens],
        split.cache,
        for_cudagraph_capture=capture,
    )
    return metadata, tables, slots


@pytest.mark.parametrize("capture", [False, True])
def test_metadata_references_the_runners_tensors(split: Model, capture: bool) -> None:
    assert split.support.min_cg_support is AttentionCGSupport.ALWAYS
    metadata, tables, slots = make_metadata(split, 4, 4, max_query_len=1, capture=capture)
    for i, group in enumerate(split.cache.kv_cache_groups):
        for name in group.layer_names:
            step = metadata[name]
            # CUDA graphs replay on these very addresses.
            assert step.block_table is tables[i]
            assert step.slot_mapping.data_ptr() == slots[i].data_ptr()
            assert (step.max_query_len, step.num_actual_tokens) == (1, 4)
    # The attention layers own no cache, but vLLM looks their metadata up.
    assert {layer.layer_name for layer in split.layers} <= metadata.keys()
    assert len({id(step.workspace) for step in metadata.values()}) == 1


def test_building_metadata_reads_no_tensor(split: Model) -> None:
    """On the meta device whatever looks at a value fails."""
    meta = {"device": "meta", "dtype": torch.int32}
    (builder,) = split.groups[0][0].metadata_builders
    common = CommonAttentionMetadata(
        query_start_loc=torch.empty(5, **meta),
        query_start_loc_cpu=torch.empty(5, **meta),
        seq_lens=torch.empty(4, **meta),
        num_reqs=4,
        num_actual_tokens=6,
        max_query_len=3,
        max_seq_len=256,
        block_table_tensor=torch.empty(4, 16, **meta),
        slot_mapping=torch.empty(6, **meta),
    )
    for step in (builder.build(0, common), builder.build_for_cudagraph_capture(common)):
        assert step.seq_lens is common.seq_lens
        assert step.block_table is common.block_table_tensor


def test_every_head_is_served_once_by_its_own_table(
    split: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def write(key: Any, value: Any, cache: Any, full_slots: Any, ring_slots: Any) -> None:
        calls.append({"slots": (full_slots, ring_slots), "cache": cache, "key": key})

    def attend(query: Any, key: Any, value: Any, output: Any, cache: Any, **rest: Any) -> None:
        assert calls[-1]["cache"] is cache, "read before it was written"
        calls[-1] |= {"output": output, **rest}
        output.fill_(1)

    monkeypatch.setattr(cuda_layer, "write_cache", write)
    monkeypatch.setattr(cuda_layer, "split_attention", attend)
    # Five tokens of two requests in a batch padded to eight.
    metadata, tables, _ = make_metadata(split, 2, 5, max_query_len=3, capture=False)
    group_of = {
        name: i for i, g in enumerate(split.cache.kv_cache_groups) for name in g.layer_names
    }
    for i, layer in enumerate(split.layers):
        calls.clear()
        query = torch.zeros(8, NUM_Q, HEAD_DIM)
        key, value = torch.zeros(2, 8, NUM_KV, HEAD_DIM)
        output = torch.zeros_like(query)
        with set_forward_context(metadata, split.vllm_config, num_tokens=8):
            layer.impl.forward(
                layer, query, key, value, layer.kv_cache, metadata[layer.layer_name], output
            )
        assert (output[:5] == 1).all()
        assert (output[5:] == 0).all()
        assert len(calls) == (1, 2)[i]
        names = iter([f"{layer.layer_name}.kvh{head}" for head in range(NUM_KV)])
        for call in calls:
            streaming = call["cache"].streaming_H.tolist()
            for cache, kind in zip(call["cache"].caches, streaming, strict=True):
                name = next(names)
                assert cache.data_ptr() == split.context[name].kv_cache.data_ptr()
                assert kind == isinstance(split.context[name].spec, RingSpec)
                assert call["ring_table_RB" if kind else "full_table_RB"] is tables[group_of[name]]
                slots = call["slots"][kind]
                assert (slots == group_of[name] - 1).all()
                assert len(slots) == 5
                assert call["max_query_len"] == 3
        assert next(names, None) is None


def test_profiling_caches_are_let_go(split: Model) -> None:
    """vLLM binds a small cache to profile CUDA graphs, then takes it away."""
    assert all(impl._parts for impl in split.impls)
    before = weakref.ref(split.impls[0]._parts[0].cache.base)
    clear_layer_kv_caches(split.context.values())
    gc.collect()
    assert before() is None
    assert not any(impl._parts for impl in split.impls)
    split.init_cache(4 << 20)
    for impl in split.impls:
        for part in impl._parts:
            assert {len(cache) for cache in part.cache.caches} == {split.cache.num_blocks}


def test_nothing_is_computed_while_memory_is_profiled(split: Model) -> None:
    layer = split.layers[0]
    output = torch.full((8, NUM_Q, HEAD_DIM), float("nan"))
    query, key = torch.zeros(8, NUM_Q, HEAD_DIM), torch.zeros(8, NUM_KV, HEAD_DIM)
    layer.impl.forward(layer, query, key, key, layer.kv_cache, None, output)
    assert (output == 0).all()


def test_gated_layers_attend_over_vllms_own_caches(
    gated: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gates that stay where they are, so that a CUDA graph reads those of the day."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gated_cuda, "write_cache", lambda *args: calls.append(args))
    monkeypatch.setattr(gated_cuda, "split_attention", lambda *args, **rest: calls.append(rest))
    assert gated.support.min_cg_support is AttentionCGSupport.ALWAYS
    metadata, (table,), slots = make_metadata(gated, 2, 5, max_query_len=3, capture=True)
    worker = RlkvWorkerExtension()
    worker.vllm_config = gated.vllm_config
    before = [impl.gates for impl in gated.impls]
    assert worker.rlkv_gates()["gates"] == [[1.0] * NUM_KV] * 2
    chosen = [[0.5, 0.25, 0.0], [1.0, 0.125, 0.75]]
    worker.rlkv_set_gates(chosen, 1)
    query, key = torch.zeros(8, NUM_Q, HEAD_DIM), torch.zeros(8, NUM_KV, HEAD_DIM)
    for layer, gates, row in zip(gated.layers, before, chosen, strict=True):
        calls.clear()
        step = metadata[layer.layer_name]
        layer.impl.forward(layer, query, key, key, layer.kv_cache, step, query)
        (_, _, cache, *both_slots), attended = calls
        assert attended["gates_H"] is gates
        assert gates.dtype == torch.float32
        assert gates.tolist() == row
        assert attended["ring_table_RB"] is attended["full_table_RB"] is table
        assert all(s.data_ptr() == slots.data_ptr() and len(s) == 5 for s in both_slots)
        assert step.workspace.lse.numel() >= 2 * 8 * NUM_Q
        # A head's rows where the kernels look for them.
        blocks = cache.base.shape[0]
        flat = torch.as_strided(cache.base, (blocks * cache.strides[0],), (1,))
        layer.kv_cache.copy_(torch.arange(layer.kv_cache.numel()).view(layer.kv_cache.shape))
        for head, offset in enumerate((cache.offsets_H * OFFSET_UNIT).tolist()):
            found = flat[offset + 2 * cache.strides[0] + 3 * cache.strides[1] :][: 2 * HEAD_DIM]
            assert found.equal(layer.kv_cache[2, head, 3])


def test_a_gated_layer_unlike_the_others_is_refused(model: Path, one_rank: None) -> None:
    class Chunked(Attention):
        pass

    with (
        set_current_vllm_config(make_config(model, GATED)),
        pytest.raises(RlkvError, match="attention layers of class Chunked"),
    ):
        Chunked(
            NUM_Q,
            HEAD_DIM,
            1.0,
            NUM_KV,
            prefix="model.layers.0.self_attn.attn",
            attn_backend=SplitCUDABackend,
        ).process_weights_after_loading(torch.float32)


class TestChoiceOfBackend:
    """vLLM's own choice on CUDA never leads a split model to full caches."""

    @pytest.fixture(autouse=True)
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(
            sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch")
        )
        from vllm.platforms.cuda import CudaPlatformBase

        class Gpu(CudaPlatformBase):
            capability = DeviceCapability(9, 0)

            @classmethod
            def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
                return cls.capability

        self.gpu = Gpu
        monkeypatch.setattr(vllm.platforms, "_current_platform", Gpu())
        _cached_get_attn_backend.cache_clear()
        yield
        _cached_get_attn_backend.cache_clear()

    @pytest.fixture(scope="class")
    def stock(self, model: Path) -> VllmConfig:
        return make_config(model, None)

    @pytest.fixture(scope="class")
    def configured(self, model: Path, profile: Path) -> VllmConfig:
        return make_config(model, {"profile": str(profile)})

    @pytest.fixture(scope="class")
    def gated(self, model: Path) -> VllmConfig:
        return make_config(model, GATED)

    @staticmethod
    def choose(vllm_config: VllmConfig, backend: str | None = None) -> Any:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        before = vllm_config.attention_config.backend
        vllm_config.attention_config.backend = backend and AttentionBackendEnum[backend]
        try:
            with set_current_vllm_config(vllm_config):
                chosen = get_attn_backend(128, torch.bfloat16, "auto")
                return chosen, chosen.get_impl_cls()
        finally:
            vllm_config.attention_config.backend = before

    def test_split_models_get_the_split_backend(self, configured: VllmConfig) -> None:
        assert self.choose(configured) == (SplitCUDABackend, SplitCUDAImpl)
        assert self.choose(configured, "CUSTOM") == (SplitCUDABackend, SplitCUDAImpl)

    def test_gated_models_get_gated_attention(
        self, gated: VllmConfig, stock: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.choose(gated) == (SplitCUDABackend, GatedCUDAImpl)
        assert self.choose(stock)[1].__module__.startswith("vllm.")
        for backend in ("TRITON_ATTN", "FLEX_ATTENTION"):
            with pytest.raises(RlkvError, match="--attention-backend other than CUSTOM"):
                self.choose(gated, backend)
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "NHD")
        gated_config(gated)
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
        with pytest.raises(RlkvError, match="VLLM_KV_CACHE_LAYOUT other than LBNHC"):
            gated_config(gated)
        monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT")
        monkeypatch.setattr(gated.model_config, "dtype", torch.float16)
        gated_config(gated)

    def test_other_models_get_what_they_would_without_the_plugin(self, stock: VllmConfig) -> None:
        chosen, impl = self.choose(stock, "TRITON_ATTN")
        from vllm.v1.attention.backends.triton_attn import (
            TritonAttentionBackend,
            TritonAttentionImpl,
        )

        assert issubclass(chosen, TritonAttentionBackend)
        assert impl is TritonAttentionImpl
        assert chosen.get_builder_cls() is TritonAttentionBackend.get_builder_cls()
        assert self.choose(stock)[1].__module__.startswith("vllm.")

    def test_in_one_process_each_model_gets_its_own(
        self, stock: VllmConfig, configured: VllmConfig
    ) -> None:
        assert self.choose(configured)[1] is SplitCUDAImpl
        assert self.choose(stock)[1].__module__.startswith("vllm.")
        # vLLM remembers the stock choice: refused, not served with full caches.
        with pytest.raises(RlkvError, match="--attention-backend CUSTOM"):
            self.choose(configured)
        assert self.choose(configured, "CUSTOM")[1] is SplitCUDAImpl

    @pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLEX_ATTENTION"])
    def test_another_backend_is_refused(self, backend: str, configured: VllmConfig) -> None:
        with pytest.raises(RlkvError, match="--attention-backend CUSTOM"):
            self.choose(configured, backend)

    def test_custom_without_a_profile_is_refused(self, stock: VllmConfig) -> None:
        with pytest.raises(RlkvError, match="no head profile"):
            self.choose(stock, "CUSTOM")

    def test_the_configuration_is_refused_before_weights_load(
        self, configured: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        check_supported(configured)
        assert split_plan(configured) is not None
        monkeypatch.setattr(configured.attention_config, "backend", AttentionBackendEnum.FLASH_ATTN)
        with pytest.raises(RlkvError, match="--attention-backend other than CUSTOM"):
            check_supported(configured)
        monkeypatch.setattr(configured.attention_config, "backend", None)
        with monkeypatch.context() as other:
            other.setattr(type(configured.model_config), "get_head_size", lambda _: 80)
            with pytest.raises(RlkvError, match="head dimensions other than 32"):
                check_supported(configured)
        monkeypatch.setattr(self.gpu, "capability", DeviceCapability(7, 5))
        with pytest.raises(RlkvError, match=r"compute capability 8\.0"):
            check_supported(configured)

    def test_what_only_the_cpu_has_shown_is_refused(
        self, configured: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for place, name, value, words in (
            (configured.model_config, "enable_sleep_mode", True, "--enable-sleep-mode"),
            (configured.cache_config, "cache_dtype", "fp8", "--kv-cache-dtype fp8 on a GPU"),
            (
                configured,
                "speculative_config",
                SimpleNamespace(method="ngram"),
                "--speculative-config on a GPU",
            ),
        ):
            with monkeypatch.context() as one:
                one.setattr(place, name, value)
                with pytest.raises(RlkvError, match=words):
                    check_supported(configured)
