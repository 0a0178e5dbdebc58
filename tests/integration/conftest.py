"""Fixtures of the engine tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.checkpoints import VOCAB, make_checkpoint
from tests.support.engines import EngineCache, write_profile


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random checkpoints by architecture, made once."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            path = tmp_path_factory.mktemp("checkpoints") / architecture
            made[architecture] = make_checkpoint(architecture, path)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def profile_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Profiles by model, full heads, sink and window, written once."""
    folder = tmp_path_factory.mktemp("profiles")
    made: dict[object, Path] = {}

    def get(model: Path, full_heads: Sequence[Sequence[int]], *, sink: int, window: int) -> Path:
        key = (model, tuple(map(tuple, full_heads)), sink, window)
        if key not in made:
            path = folder / f"{len(made)}.json"
            made[key] = write_profile(model, full_heads, path, sink=sink, window=window)
        return made[key]

    return get


@pytest.fixture(scope="session")
def engines() -> Iterator[EngineCache]:
    """Shares engines between neighbouring tests."""
    cache = EngineCache()
    yield cache
    cache.close()


def random_prompt(length: int, seed: int) -> list[int]:
    """Random token ids, none of them special."""
    rng = random.Random(f"{length}-{seed}")
    return [rng.randrange(3, VOCAB) for _ in range(length)]
