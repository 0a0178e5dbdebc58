"""Settings of all tests."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Triton's library functions and our kernels are interpreted or compiled as decided when they are
# first imported, by whichever test comes first. Only here: engines that tests start know nothing
# of it.
if importlib.util.find_spec("triton") and os.environ.get("RLKV_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import rlkv_vllm.kernels.split_attention  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

# The same examples every time: a red build must be red again on the next run.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers (`make test`): one for servers, one for engines, and unit tests for both.

    Tests of a group run in one worker and in order, so that they share servers and engines.
    """
    here = Path(__file__).parent
    for item in items:
        kind, *rest = item.path.relative_to(here).parts
        group = "/".join((kind, *rest)) if kind == "unit" else kind
        item.add_marker(pytest.mark.xdist_group(group))
