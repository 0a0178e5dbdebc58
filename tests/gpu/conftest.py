"""Tests that need a GPU: `make test-gpu` runs them, all other runs skip them."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if os.environ.get("RLKV_TEST_DEVICE") != "cuda":
        pytest.skip("needs a CUDA GPU: `make test-gpu` on a machine with one")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("RLKV_TEST_DEVICE=cuda, but torch sees no CUDA GPU")
