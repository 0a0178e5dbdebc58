"""From the user's options to engines: model, profile, cache, and how each variant starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.span import SERVING_SPAN
from rlkv_vllm.bench import random_model
from rlkv_vllm.bench.case import ALL_FULL, SPLIT, STOCK, TRANSFORMERS, VLLM, Setup
from rlkv_vllm.bench.engine import EngineSpec
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.models import MODEL_NAME, fingerprint_from_config, load_model_config, model_source
from rlkv_vllm.planning.roofline import ModelSize
from rlkv_vllm.profile.choice import choose_profile
from rlkv_vllm.profile.forecast import forecast_profile
from rlkv_vllm.profile.io import check_matches

#: The embedded model has short contexts, so only a small cache limits it.
EMBEDDED_MEMORY = 64 * 2**20
MEMORY = 2 * 2**30
#: Contexts of the quick suite and of the full one, with room for what is generated.
MAX_MODEL_LEN, FULL_MAX_MODEL_LEN = 8192 + 256, 32768 + 256
RANDOM_SPARSITY = 0.5


@dataclass(frozen=True)
class Options:
    """The options of `rlkv bench` for one model; None is the default that its help names."""

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
    """One model with its engines."""

    key: str  # in the record
    name: str
    profile: str  # its name
    sparsity: float
    setup: Setup
    specs: dict[str, EngineSpec]  # by variant

    def describe(self) -> dict[str, Any]:
        """Settings that must agree when a run is continued."""
        forecast = self.setup.forecasts[SPLIT]
        geometry, stock = forecast.geometry, self.specs[STOCK]
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
            "threads": stock.threads,
            "engine": {name: stock.options[name] for name in ("dtype", "enforce_eager")},
        }


def find_target(key: str, options: Options, folder: Path) -> Target:
    """Read model and profile, and forecast the cache; a random model is written to `folder`.

    Raises:
        RlkvError: there is no such model or profile, they do not fit, or the longest request
            does not fit the memory.
    """
    is_embedded = options.model == MODEL_NAME
    is_random = options.model.startswith(random_model.PREFIX)
    profile_name = options.profile or (MODEL_NAME if is_embedded else "")
    if is_random:
        shape = random_model.parse_shape(options.model)
        random_model.write_model(shape, folder, **SERVING_SPAN._asdict())
        source = str(folder)
        profile_name = profile_name or str(folder / "profile.json")
    else:
        source = model_source(options.model)
    if not profile_name:
        raise RlkvError(
            f"--profile: needed for model {one_line(options.model)}: `rlkv score` and "
            "`rlkv train` make one, `rlkv profile import` reads published ones"
        )
    config, commit = load_model_config(source)
    choice = choose_profile(
        profile_name,
        options.sparsity,
        sink=options.sink,
        window=options.window,
        default_sparsity=RANDOM_SPARSITY if is_random else None,
    )
    choices = {SPLIT: choice, ALL_FULL: replace(choice, sparsity=0.0)}
    check_matches(choice.profile, fingerprint_from_config(config, options.model, commit))
    dtype = options.dtype or ("float32" if is_embedded else "bfloat16" if is_random else "auto")
    dtype_bytes = 4 if dtype in ("float32", "float") else 2
    model = ModelSize.from_config(config, dtype_bytes)
    longest = int(config.get("max_position_embeddings") or FULL_MAX_MODEL_LEN)
    wanted = FULL_MAX_MODEL_LEN if options.full else MAX_MODEL_LEN
    max_model_len = options.max_model_len or min(longest, wanted)
    memory = options.memory_bytes or (EMBEDDED_MEMORY if is_embedded else MEMORY)
    span = choice.span._asdict()
    sizes = {"dtype_bytes": dtype_bytes, "max_model_len": max_model_len, **span}
    setup = Setup(
        model=model,
        forecasts={
            variant: forecast_profile(one.profile, one.sparsity, **sizes)
            for variant, one in choices.items()
        },
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
        "enforce_eager": not options.is_cuda if options.eager is None else options.eager,
        "max_model_len": max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": memory,
        "enable_prefix_caching": True,
    }
    if is_random:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if options.is_cuda:
        engine["gpu_memory_utilization"] = 0.4  # the share that must be free; two engines share it
    # The engine beside a trainer is eager also on a GPU.
    rollouts = (engine | {"enforce_eager": options.eager is not False}, {"mode": "gated"} | span)
    started: dict[str, tuple[dict[str, Any], dict[str, Any] | None]]
    started = {variant: (engine, one.engine_config()) for variant, one in choices.items()}
    started |= {STOCK: (engine, None), TRANSFORMERS: rollouts, VLLM: rollouts}
    return Target(
        key=key,
        name=options.model,
        profile="random" if is_random and not options.profile else profile_name,
        sparsity=choice.sparsity,
        setup=setup,
        specs={
            variant: EngineSpec(variant, source, *how, options.threads)
            for variant, how in started.items()
        },
    )
