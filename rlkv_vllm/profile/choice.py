"""A head profile with the options it is served with, checked in this one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import check_sparsity
from rlkv_vllm.allocation.span import Span, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.budget import Budget
from rlkv_vllm.profile.evidence import Target, Within, require_rows, require_within
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.profile.schema import HeadProfile


@dataclass(frozen=True)
class ProfileChoice:
    """A profile, its sparsity, sink and window, all checked."""

    name: str  # as the user gave it
    profile: HeadProfile
    path: Path  # the local file it was read from
    sparsity: float
    span: Span
    within: Within | None = None  # why this sparsity, if an accuracy budget chose it

    def engine_config(self) -> dict[str, Any]:
        """``additional_config["rlkv"]``; the checksum makes every process use the checked file.

        With a budget the engine chooses the sparsity again: it knows its ranks and its cache best.
        """
        how: Mapping[str, Any] = {"sparsity": self.sparsity}
        if self.within is not None and self.within.sparsity == self.sparsity:
            how = self.within.budget.options()
        return _engine_config(self.path, self.profile, self.span, how)


def choose_profile(
    name: str,
    sparsity: float | None = None,
    *,
    sink: int | None = None,
    window: int | None = None,
    default_sparsity: float | None = None,
    found: tuple[HeadProfile, Path] | None = None,
    budget: Budget | None = None,
    target: Target | None = None,
) -> ProfileChoice:
    """Find a profile, and check what it is to be served with; None: as the profile says.

    `default_sparsity` is for a profile that recommends none, `found` what `find_profile` gave for
    this name, if it was called before. With a `budget` the evaluation rows of what `target` serves
    choose the sparsity.

    Raises:
        RlkvError: no such profile, it is not valid, no sparsity is known or within the budget, or a
            value is out of range.
    """
    profile, path = found or find_profile(name)
    if budget is not None:
        span = resolve_span(sink, window, Span(profile.sink, profile.window))
        within = require_within(name, path, profile, budget, target or Target(), span)
        return ProfileChoice(name, profile, path, within.sparsity, span, within)
    known = (sparsity, profile.recommended_sparsity, default_sparsity)
    sparsity = next((share for share in known if share is not None), None)
    if sparsity is None:
        raise RlkvError(
            f"--sparsity is missing and profile {one_line(name)} recommends none: give the share "
            "of KV heads that keep only sink and window, from 0 to 1, or --max-loss"
        )
    check_sparsity(sparsity)
    span = resolve_span(sink, window, Span(profile.sink, profile.window))
    return ProfileChoice(name, profile, path, sparsity, span)


def budget_config(
    name: str, budget: Budget, *, sink: int | None = None, window: int | None = None
) -> dict[str, Any]:
    """``additional_config["rlkv"]`` with a budget, for an engine that is not known yet.

    Raises:
        RlkvError: no such profile, it is not valid or has no evaluation rows, or a value is out of
            range.
    """
    profile, path = find_profile(name)
    span = resolve_span(sink, window, Span(profile.sink, profile.window))
    require_rows(name, path, profile, budget, span)
    return _engine_config(path, profile, span, budget.options())


def _engine_config(
    path: Path, profile: HeadProfile, span: Span, how: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "profile": str(path.resolve()),
        **how,
        "sink": span.sink,
        "window": span.window,
        "sha256": profile.sha256(),
    }
