"""Checks before any weights are loaded; each refuses in one line."""

from __future__ import annotations

import argparse
import errno
import os
import socket
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm import models
from rlkv_vllm.allocation.span import TRAINING_SPAN, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.budget import asked_budget
from rlkv_vllm.profile.choice import choose_profile
from rlkv_vllm.profile.evidence import Target
from rlkv_vllm.profile.io import check_matches, is_made_for
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.serving.arguments import parse_early

if TYPE_CHECKING:
    from rlkv_vllm.engine.config import SplitPlan

PLUGIN_NAME = "rlkv"
GENERAL_PLUGINS = "vllm.general_plugins"
ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
STAT_LOGGER_PLUGINS = "vllm.stat_logger_plugins"
_OTHER_PLUGIN_GROUPS = (
    GENERAL_PLUGINS,
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    STAT_LOGGER_PLUGINS,
)


def check_early(arguments: Sequence[str]) -> None:
    """Check what needs no vLLM: flags, profile, model, their fit, and the address.

    vLLM's import takes long. All is checked again after it, then with what ``--config`` says.

    Raises:
        RlkvError: as `split_options`, `gated_options`, `check_api_key` and `check_address`.
    """
    args = parse_early(arguments)
    if args.config is not None:  # vLLM reads it
        return
    if args.mode == "gated":
        gated_options(args)
    else:
        split_options(args)
    check_api_key(args)
    check_address(args)


def split_options(args: argparse.Namespace) -> dict[str, Any]:
    """Check profile, model and split options; return ``additional_config["rlkv"]``.

    Raises:
        RlkvError: in this order: profile, model, their fit, sparsity or budget, sink, window,
            evaluation rows.
    """
    if args.profile is None:
        raise RlkvError(
            f"--profile is missing: name the head profile of {one_line(args.model)}, see "
            "`rlkv profile list`"
        )
    found = find_profile(args.profile)
    check_matches(found[0], models.load_model_fingerprint(args.model, args.revision))
    choice = choose_profile(
        args.profile,
        args.sparsity,
        sink=args.sink,
        window=args.window,
        found=found,
        budget=asked_budget(args.max_loss, args.evidence, args.sparsity),
        target=target_of(args),
    )
    return choice.engine_config()


def target_of(args: argparse.Namespace) -> Target:
    """The engine that the flags ask for, as far as evaluation rows depend on it."""
    words = models.evaluation_words(args.model_name)
    return Target(args.tensor_parallel_size or 1, args.kv_cache_dtype, words)


def note_on_rows(args: argparse.Namespace) -> str | None:
    """A line for the user if a budget rests on rows that were measured with another model."""
    if args.mode == "gated" or args.max_loss is None:
        return None
    profile, _ = find_profile(args.profile)
    fingerprint = models.load_model_fingerprint(args.model, args.revision)
    if is_made_for(profile, fingerprint):
        return None
    return (
        f"warning: the rows that choose the sparsity are of {one_line(profile.model.id)}, not of "
        f"{one_line(fingerprint.id)}: unless one is a copy of the other, measure with `rlkv eval`"
    )


def gated_options(args: argparse.Namespace) -> dict[str, Any]:
    """Check the options of gated mode; return ``additional_config["rlkv"]``.

    Raises:
        RlkvError: flags of a head profile are given, sink or window are out of range, or there are
            several API processes, which would not know each other's gates.
    """
    for flag in ("--profile", "--sparsity", "--max-loss", "--evidence"):
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise RlkvError(f"{flag}: a server in gated mode has no head profile: remove the flag")
    if (args.api_server_count or 1) > 1:
        raise RlkvError("--api-server-count: a server in gated mode has one: remove the flag")
    default = models.default_span(args.model_name, TRAINING_SPAN)
    sink, window = resolve_span(args.sink, args.window, default)
    return {"mode": "gated", "sink": sink, "window": window}


#: Flags of vLLM, and their value where they are not given. With another value nothing could
#: prove that the split is active.
SERVER_REFUSALS: dict[str, object] = {
    "--headless": False,
    "--grpc": False,
    "--grpc-port": None,
    "--data-parallel-multi-port-external-lb": False,
    "VLLM_USE_RUST_FRONTEND": "0",
}


def check_server_mode(args: argparse.Namespace) -> None:
    """Refuse every one of :data:`SERVER_REFUSALS`."""
    for flag, plain in SERVER_REFUSALS.items():
        if flag.startswith("--"):
            value = getattr(args, flag[2:].replace("-", "_"))
        else:
            value = os.environ.get(flag) or plain
        if value != plain:
            raise RlkvError(
                f"{flag}: `rlkv serve` cannot prove there that the split cache is active: "
                "remove it and run one HTTP server per engine"
            )


def check_api_key(args: argparse.Namespace) -> None:
    """Refuse an empty ``--api-key``, e.g. of an unset variable: vLLM would ask for none."""
    if args.api_key and not all(args.api_key):
        raise RlkvError(
            "--api-key: an empty key would open the server to all: give it a text, or remove the "
            "flag"
        )


def import_vllm() -> None:
    """Import most of vLLM, which finds broken companions such as torchvision.

    Raises:
        RlkvError: this version is not supported.
        Exception: anything that a broken installation raises.
    """
    from rlkv_vllm.engine.compat import check_vllm_version

    check_vllm_version()
    import_module("vllm.engine.arg_utils")


def check_address(args: argparse.Namespace) -> None:
    """Refuse a ``--port``, ``--host`` or ``--uds`` that the server could not listen on."""
    if args.uds:
        if Path(args.uds).exists():
            raise RlkvError(f"--uds {one_line(args.uds)}: exists: remove it or name another")
        return
    if not 0 <= args.port <= 65535:
        raise RlkvError(f"--port {args.port}: must be from 0 to 65535")
    host = args.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As vLLM binds: without it a port that was in use a minute ago looks busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, args.port))
            probe.listen(1)
        except OSError as error:
            raise RlkvError(_address_error(args, error)) from error


def _address_error(args: argparse.Namespace, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port {args.port}: in use by another program: stop that one or choose another, "
            f"e.g. --port {args.port + 1 if args.port < 65535 else 8000}"
        )
    if error.errno == errno.EACCES:
        return f"--port {args.port}: only the superuser may listen there: use 1024 or more"
    return (
        f"--host {one_line(args.host)}: not an address of this machine ({error.strerror}): use "
        "127.0.0.1, or 0.0.0.0 for all"
    )


def select_plugins() -> None:
    """Put ``rlkv`` on the list of plugins that vLLM may load (``VLLM_PLUGINS``).

    vLLM loads endpoint plugins only when that list names them, and with a list it loads nothing
    else. So the list names what vLLM would load without one: not the other endpoint plugins.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        found = {e.name for group in _OTHER_PLUGIN_GROUPS for e in entry_points(group=group)}
        names = sorted(found - {e.name for e in entry_points(group=ENDPOINT_PLUGINS)})
    if PLUGIN_NAME not in names:
        names.append(PLUGIN_NAME)
    os.environ["VLLM_PLUGINS"] = ",".join(names)


def check_plugin() -> None:
    """Refuse an installation whose plugin vLLM would not find or could not load.

    vLLM only logs that and goes on with full caches.
    """
    for group, value in (
        (GENERAL_PLUGINS, "rlkv_vllm.plugin:register"),
        (ENDPOINT_PLUGINS, "rlkv_vllm.serving.endpoint:RlkvEndpoint"),
        (STAT_LOGGER_PLUGINS, "rlkv_vllm.serving.metrics:RlkvStatLogger"),
    ):
        found = [entry for entry in entry_points(group=group) if entry.name == PLUGIN_NAME]
        if [entry.value for entry in found] != [value]:
            shown = ", ".join(entry.value for entry in found) or "none"
            raise RlkvError(
                f"plugin {PLUGIN_NAME} of {group}: vLLM finds {shown}, expected {value}: install "
                "rlkv-vllm again (pip install --force-reinstall --no-deps rlkv-vllm)"
            )
        if group == STAT_LOGGER_PLUGINS:  # imports vLLM; the endpoint plugin looks for it
            continue
        try:
            found[0].load()
        except Exception as error:  # any import error leaves the cache unsplit
            raise RlkvError(
                f"plugin {PLUGIN_NAME} of {group} cannot be loaded "
                f"({type(error).__name__}: {one_line(error)}): run `rlkv doctor`"
            ) from error


def choose_cpu_memory(args: argparse.Namespace, cache_bytes: int | None) -> str | None:
    """Size the KV cache on the CPU where the user gives no size.

    vLLM claims 92% of the memory and refuses to start when less is free. Sets the cache size or
    the memory share of `args`; without default `cache_bytes` the cache gets what is free. Returns
    a line for the user if a setting is overridden or vLLM's default changed.
    """
    import psutil

    legacy = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if legacy:
        if args.kv_cache_memory_bytes is None:
            return None
        return (
            f"warning: VLLM_CPU_KVCACHE_SPACE={legacy} (GiB) overrides --kv-cache-memory-bytes "
            f"{args.kv_cache_memory_bytes}: unset the variable to use the flag"
        )
    if args.kv_cache_memory_bytes is not None:
        return None
    if cache_bytes is not None:
        args.kv_cache_memory_bytes = cache_bytes
        return None
    memory = psutil.virtual_memory()
    free_share = int(memory.available / memory.total * 90) / 100
    if args.gpu_memory_utilization <= free_share:
        return None
    given, args.gpu_memory_utilization = args.gpu_memory_utilization, free_share
    return (
        f"using {free_share:.0%} of the memory (vLLM's share is {given:.0%}, more than is free): "
        "set --kv-cache-memory-bytes for a cache of fixed size"
    )


def check_capacity(plan: SplitPlan, cache_bytes: int | None) -> None:
    """Refuse a cache in which a request of ``--max-model-len`` would never fit.

    `cache_bytes` are those of one worker; None when vLLM measures what is free.
    """
    forecast = plan.forecast
    if cache_bytes is None or forecast.num_blocks(cache_bytes) > plan.admission_blocks:
        return
    need = plan.admission_blocks * max(forecast.block_bytes(rank) for rank in forecast.ranks)
    raise RlkvError(
        f"--kv-cache-memory-bytes {cache_bytes:,}: one request of --max-model-len "
        f"{plan.max_model_len:,} needs {need:,} bytes and a spare block: raise the "
        "cache size or lower the length"
    )
