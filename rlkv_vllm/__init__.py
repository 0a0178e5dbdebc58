"""Serve reasoning models from stock vLLM with a per-head split KV cache.

from vllm import LLM
from rlkv_vllm import prove, split

llm = LLM("org/model", **split("profile.json", sparsity=0.5))
prove(llm)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkv_vllm.engine.launch import prove, split
    from rlkv_vllm.profile.io import load_profile

__version__ = "0.1.0"

__all__ = ["__version__", "load_profile", "prove", "split"]

_HOMES = {
    "load_profile": "rlkv_vllm.profile.io",
    "prove": "rlkv_vllm.engine.launch",
    "split": "rlkv_vllm.engine.launch",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: most commands need no vLLM."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
