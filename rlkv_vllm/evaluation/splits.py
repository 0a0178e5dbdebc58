"""Which splits of the cache an evaluation needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.profile.schema import HeadProfile

#: The baselines of every table: sparsity 0, and sparsity 1 (StreamingLLM, arXiv 2309.17453).
FULL, STREAMING = "full cache", "all streaming"

_NAMED = re.compile(r"(?P<label>[^/@:#=]+)=(?P<profile>.+)")
_NO_NAMES = ("profile", "head_profile")  # files that every run calls the same


@dataclass(frozen=True)
class Candidate:
    """A profile under evaluation.

    Attributes:
        label: what tables call it.
        name: what the user called it.
        profile: its gates.
        path: the local file they were read from.
        sink: first tokens that its streaming heads keep.
        window: last tokens that its streaming heads keep.
    """

    label: str
    name: str
    profile: HeadProfile
    path: Path
    sink: int
    window: int


@dataclass(frozen=True)
class Split:
    """One row of the table: what one engine is started with.

    Attributes:
        label: the profile's, or that of a baseline.
        sparsity: share of streaming KV heads.
        profile: file of the gates.
        sink: first tokens that streaming heads keep.
        window: last tokens that streaming heads keep.
        full_heads: full KV heads per layer.
    """

    label: str
    sparsity: float
    profile: Path
    sink: int
    window: int
    full_heads: tuple[tuple[int, ...], ...]

    def engine_config(self) -> dict[str, Any]:
        """``additional_config["rlkv"]`` of the engine."""
        return {
            "profile": str(self.profile),
            "sparsity": self.sparsity,
            "sink": self.sink,
            "window": self.window,
        }

    @cached_property
    def digest(self) -> str:
        """Equal for splits that serve alike, whichever profiles they come from."""
        is_whole = self.sparsity == 0  # no head has a sink or a window
        parts = [self.full_heads, None if is_whole else [self.sink, self.window]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_candidates(
    names: Sequence[str], sink: int | None = None, window: int | None = None
) -> list[Candidate]:
    """Load the profiles to evaluate and give each of them a label of its own.

    The label is the name of the file, or the method where the file is called `profile.json` or
    `head_profile.json`.

    Args:
        names: what `find_profile` takes, or LABEL=NAME.
        sink: instead of the profiles'.
        window: instead of the profiles'.

    Raises:
        RlkvError: if there is no such profile, it is not valid, or two have the same label.
    """
    candidates = []
    for given in names:
        # A file may have an equals sign in its name.
        match = None if Path(given).is_file() else _NAMED.fullmatch(given)
        name = match["profile"] if match else given
        profile, path = find_profile(name)
        stem = profile.provenance.method if path.stem in _NO_NAMES else path.stem
        candidates.append(
            Candidate(
                label=one_line(match["label"] if match else stem, 40),
                name=name,
                profile=profile,
                path=path,
                sink=profile.sink if sink is None else sink,
                window=profile.window if window is None else window,
            )
        )
    labels = Counter(candidate.label for candidate in candidates)
    for label, count in labels.items():
        if count > 1:
            same = ", ".join(one_line(c.name, 60) for c in candidates if c.label == label)
            raise RlkvError(
                f"--profile {same}: all are called {label}: name them apart with "
                f"--profile LABEL={one_line(candidates[-1].name, 60)}"
            )
        if label == FULL or label.startswith(STREAMING):
            raise RlkvError(f"--profile: {label} is the name of a baseline: choose another label")
    return candidates


def plan(candidates: Sequence[Candidate], sparsities: Sequence[float]) -> list[Split]:
    """The rows of the table: the full cache, every profile at every sparsity, all streaming.

    The baselines do not depend on the gates, so there is one of each; profiles of different
    sink or window need one all-streaming row for each of them.

    Args:
        candidates: at least one, all of the same model.
        sparsities: shares of streaming heads; 0 and 1 are always there.

    Raises:
        RlkvError: if a sparsity is no share.
    """
    first = candidates[0]
    inner = sorted({float(share) for share in sparsities} - {0.0, 1.0})
    windows = {(c.sink, c.window): c for c in candidates}
    return [
        _split(first, FULL, 0.0),
        *(_split(c, c.label, share) for c in candidates for share in inner),
        *(
            _split(c, STREAMING if len(windows) == 1 else f"{STREAMING} {sink}+{window}", 1.0)
            for (sink, window), c in windows.items()
        ),
    ]


def _split(candidate: Candidate, label: str, sparsity: float) -> Split:
    return Split(
        label=label,
        sparsity=sparsity,
        profile=candidate.path,
        sink=candidate.sink,
        window=candidate.window,
        full_heads=allocate(candidate.profile.gates, sparsity).full,
    )


def concerns(split: Split, candidate: Candidate) -> bool:
    """Whether `split` is one of the candidate's own or one of its baselines."""
    if split.sparsity == 1:
        return (split.sink, split.window) == (candidate.sink, candidate.window)
    return split.label in (FULL, candidate.label)
