"""Which splits of the cache an evaluation needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rlkv_vllm.allocation.heads import Allocation, allocate, check_sparsity
from rlkv_vllm.allocation.span import Span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.choice import ProfileChoice, choose_profile
from rlkv_vllm.tasks.measurement import Measurement

#: The baselines of every table: sparsity 0, and sparsity 1 (StreamingLLM, arXiv 2309.17453).
FULL, STREAMING = "full cache", "all streaming"

#: Answers of the problems in [start, end), by a model with one split of its cache.
Ask = Callable[[int, int], Measurement]
#: Seeds of one evaluation, so that no two share one.
SEEDS = 1_000_003

_NAMED = re.compile(r"(?P<label>[^/@:#=]+)=(?P<profile>.+)")
_NO_NAMES = ("profile", "head_profile")  # files that every run calls the same


@dataclass(frozen=True)
class Split:
    """One row of the table: what one engine is started with.

    `label` is that of the profile or of the baseline; `tp_size` is the number of ranks, which
    share the full heads evenly.
    """

    label: str
    choice: ProfileChoice
    tp_size: int = 1

    @property
    def sparsity(self) -> float:
        return self.choice.sparsity

    @property
    def span(self) -> Span:
        return self.choice.span

    @cached_property
    def allocation(self) -> Allocation:
        """The full KV heads, as `tp_size` ranks serve them."""
        return allocate(self.choice.profile.gates, self.sparsity, self.tp_size)

    @cached_property
    def digest(self) -> str:
        """Equal for splits that serve alike, whichever profiles they come from."""
        return self.allocation.digest(*self.span)


def find_candidates(
    names: Sequence[str], sink: int | None = None, window: int | None = None
) -> dict[str, ProfileChoice]:
    """Load the profiles to evaluate and give each of them a label of its own.

    The label is the name of the file, or the method where the file is called `profile.json` or
    `head_profile.json`. `names` are what `find_profile` takes, or LABEL=NAME; `sink` and `window`
    replace those of the profiles.

    Raises:
        RlkvError: a profile does not exist or is not valid, or two have the same label.
    """
    found: dict[str, list[ProfileChoice]] = {}
    for given in names:
        # A file may have an equals sign in its name.
        match = None if Path(given).is_file() else _NAMED.fullmatch(given)
        name = match["profile"] if match else given
        choice = choose_profile(name, 0.0, sink=sink, window=window)
        stem = choice.path.stem
        if stem in _NO_NAMES:
            stem = choice.profile.provenance.method
        found.setdefault(one_line(match["label"] if match else stem, 40), []).append(choice)
    for label, choices in found.items():
        if len(choices) > 1:
            same = [one_line(choice.name, 60) for choice in choices]
            raise RlkvError(
                f"--profile {', '.join(same)}: all are called {label}: give them different labels "
                f"with --profile LABEL={same[-1]}"
            )
        if label == FULL or label.startswith(STREAMING):
            raise RlkvError(f"--profile: {label} is the name of a baseline: choose another label")
    return {label: choice for label, (choice,) in found.items()}


def plan(
    candidates: Mapping[str, ProfileChoice], sparsities: Sequence[float], tp_size: int = 1
) -> list[Split]:
    """The rows of the table: the full cache, every profile at every sparsity, all streaming.

    The baselines do not depend on the gates, so there is one of each, but one all-streaming row
    for every pair of sink and window. All profiles are of the same model, on `tp_size` ranks.

    Raises:
        RlkvError: a sparsity is not in [0, 1], or the ranks do not fit the heads.
    """
    for share in sparsities:
        check_sparsity(share)
    inner = sorted({float(share) for share in sparsities} - {0.0, 1.0})
    spans = {choice.span: choice for choice in candidates.values()}
    rows = [(FULL, next(iter(candidates.values())), 0.0)]
    rows += [(label, choice, share) for label, choice in candidates.items() for share in inner]
    for span, choice in spans.items():
        label = STREAMING if len(spans) == 1 else f"{STREAMING} {span.sink}+{span.window}"
        rows.append((label, choice, 1.0))
    return [Split(label, replace(choice, sparsity=share), tp_size) for label, choice, share in rows]


def concerns(split: Split, label: str, choice: ProfileChoice) -> bool:
    """Whether `split` is of this profile or one of its baselines."""
    if split.sparsity == 1:
        return split.span == choice.span
    return split.label in (FULL, label)
