"""Settings of all tests."""

import importlib.util
import os
from typing import Any

import pytest
from hypothesis import settings

# Triton's library functions and our kernels are interpreted or compiled as decided when they are
# first imported, by whichever test comes first. Only here: engines that tests start know nothing
# of it.
if importlib.util.find_spec("triton") and os.environ.get("RLKV_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import rlkv_vllm.kernels.triton.split_attention  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

# The same examples every time: a red build must be red again on the next run.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two workers (`make test`): one for servers, one for engines, and unit tests for both.

    Servers and engines are shared in a process. Marks of pytest-xdist would say the same, but
    they have no effect in pytest 9.2.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByKind(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            kind = file.split("/")[1]
            return file if kind == "unit" else kind

    return ByKind(config, log)
