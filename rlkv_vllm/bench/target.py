"""From what the user names to engines: model, profile, cache, and what each variant starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.forecast import Forecast
from rlkv_vllm.bench import random_model
from rlkv_vllm.bench.case import ALL_FULL, SPLIT, STOCK, Setup
from rlkv_vllm.bench.worker import EngineSpec
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.models import MODEL_NAME, fingerprint_from_config, load_model_config, model_source
from rlkv_vllm.planning.roofline import ModelSize
from rlkv_vllm.profile.forecast import forecast_profile
from rlkv_vllm.profile.io import check_matches
from rlkv_vllm.profile.lookup import find_profile, resolve_sparsity

#: The embedded model has small contexts, so that a small cache is what limits it.
EMBEDDED_MEMORY = 64 * 2**20
#: A few of its answers at once.
SOLVE_MEMORY, SOLVE_MAX_MODEL_LEN = 8 * 2**20, 1024
MEMORY = 2 * 2**30
#: Contexts of the quick suite and of the full one, with room for what is generated.
MAX_MODEL_LEN, FULL_MAX_MODEL_LEN = 8192 + 256, 32768 + 256
RANDOM_SINK, RANDOM_WINDOW, RANDOM_SPARSITY = 16, 64, 0.5


@dataclass(frozen=True)
class Options:
    """What the user asked for, one model's worth.

    Attributes:
        model: folder, Hub id, `embedded`, or `random:LAYERSxKV_HEADSxHEAD_DIM`.
        profile: head profile; None where the model brings one.
        sparsity: share of streaming heads; None: the profile's own.
        sink: instead of the profile's.
        window: instead of the profile's.
        memory_bytes: KV cache of every engine; None: by the model.
        max_model_len: longest request; None: by suite and model.
        max_num_seqs: most requests at once.
        dtype: of the model; None: vLLM's choice.
        eager: without compilation and graphs; None: on a CPU.
        threads: of a CPU engine.
        full: all points.
        task: whose problems are solved.
        turn_seconds: of endless requests.
        is_cuda: the engines run on a GPU.
    """

    model: str
    profile: str | None
    sparsity: float | None
    sink: int | None
    window: int | None
    memory_bytes: int | None
    max_model_len: int | None
    max_num_seqs: int
    dtype: str | None
    eager: bool | None
    threads: int
    full: bool
    task: str
    turn_seconds: float
    is_cuda: bool


@dataclass(frozen=True)
class Target:
    """One model with its engines.

    Attributes:
        key: what the record calls it.
        name: of the model.
        profile: its head profile's name.
        sparsity: share of streaming heads.
        setup: what is known of it.
        specs: what to start, by variant.
    """

    key: str
    name: str
    profile: str
    sparsity: float
    setup: Setup
    specs: dict[str, EngineSpec]

    def describe(self) -> dict[str, Any]:
        """Settings that must agree when a run is continued."""
        forecast = self.setup.forecasts[SPLIT]
        geometry = forecast.geometry
        return {
            "model": self.name,
            "profile": self.profile,
            "sparsity": self.sparsity,
            "full_heads": forecast.groups.allocation.num_full,
            "streaming_heads": forecast.groups.allocation.num_streaming,
            "sink": geometry.sink,
            "window": geometry.window,
            "layers": geometry.num_layers,
            "kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "weights_bytes": self.setup.model.resident_bytes,
            "memory_bytes": self.setup.memory_bytes,
            "max_model_len": self.setup.max_model_len,
            "max_num_seqs": self.setup.max_num_seqs,
            "threads": self.specs[STOCK].threads,
            "engine": {
                key: value
                for key, value in self.specs[STOCK].options.items()
                if key in ("dtype", "enforce_eager")
            },
        }


def find_target(key: str, options: Options, folder: Path) -> Target:
    """Read model and profile, and forecast the cache.

    Args:
        key: what the record calls it.
        options: what the user asked for.
        folder: where a random model may be written.

    Raises:
        RlkvError: there is no such model or profile, they do not fit, or the longest request
            does not fit the memory.
    """
    is_embedded = options.model == MODEL_NAME
    is_random = options.model.startswith(random_model.PREFIX)
    if is_random:
        sink = RANDOM_SINK if options.sink is None else options.sink
        window = RANDOM_WINDOW if options.window is None else options.window
        shape = random_model.parse_shape(options.model)
        random_model.write_model(shape, folder, sink=sink, window=window)
        source, profile_name = str(folder), options.profile or str(folder / "profile.json")
    else:
        source = model_source(options.model)
        profile_name = options.profile or (MODEL_NAME if is_embedded else "")
    if not profile_name:
        raise RlkvError(
            f"--profile: needed for model {one_line(options.model)}: `rlkv score` and "
            "`rlkv train` make one, `rlkv profile import` reads published ones"
        )
    config, commit = load_model_config(source)
    profile, path = find_profile(profile_name)
    check_matches(profile, fingerprint_from_config(config, options.model, commit))
    given = options.sparsity
    if is_random and given is None and profile.recommended_sparsity is None:
        given = RANDOM_SPARSITY
    sparsity = resolve_sparsity(profile, given, profile_name)
    dtype = options.dtype or ("float32" if is_embedded else "bfloat16" if is_random else "auto")
    dtype_bytes = 4 if dtype in ("float32", "float") else 2
    model = ModelSize.from_config(config, dtype_bytes)
    longest = int(config.get("max_position_embeddings") or FULL_MAX_MODEL_LEN)
    wanted = FULL_MAX_MODEL_LEN if options.full else MAX_MODEL_LEN
    max_model_len = options.max_model_len or min(longest, wanted)
    memory = options.memory_bytes or (EMBEDDED_MEMORY if is_embedded else MEMORY)
    eager = not options.is_cuda if options.eager is None else options.eager

    def forecast(share: float) -> Forecast:
        return forecast_profile(
            profile,
            share,
            dtype_bytes=dtype_bytes,
            max_model_len=max_model_len,
            sink=options.sink,
            window=options.window,
        )

    setup = Setup(
        model=model,
        forecasts={SPLIT: forecast(sparsity), ALL_FULL: forecast(0.0)},
        memory_bytes=memory,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        stock_block_size=16 if options.is_cuda else 128,
        task=options.task,
        turn_seconds=options.turn_seconds,
        has_tokenizer=not is_random,
    )
    fitting = (setup.blocks(STOCK) - 1) * setup.stock_block_size
    if fitting < max_model_len:
        need = (max_model_len + 2 * setup.stock_block_size) * model.token_bytes
        raise RlkvError(
            f"--memory {memory:,}: a full cache holds {max(0, fitting):,} tokens, less than one "
            f"request of --max-model-len {max_model_len:,}, which needs {need:,} bytes"
        )
    engine: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": memory,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if is_random:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if options.is_cuda:
        engine["gpu_memory_utilization"] = 0.4  # vLLM asks for so much to be free; two share it

    def spec(variant: str, share: float | None) -> EngineSpec:
        split = None
        if share is not None:
            split = {"profile": str(path), "sparsity": share}
            for name in ("sink", "window"):
                if (value := getattr(options, name)) is not None:
                    split[name] = value
        return EngineSpec(variant, source, engine, split, options.threads)

    return Target(
        key=key,
        name=options.model,
        profile="random" if is_random and not options.profile else profile_name,
        sparsity=sparsity,
        setup=setup,
        specs={
            STOCK: spec(STOCK, None),
            SPLIT: spec(SPLIT, sparsity),
            ALL_FULL: spec(ALL_FULL, 0.0),
        },
    )
