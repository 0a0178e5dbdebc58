"""A head profile with the options it is served with, checked in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import check_sparsity
from rlkv_vllm.allocation.span import Span, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
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

    def engine_config(self) -> dict[str, Any]:
        """``additional_config["rlkv"]``; the checksum makes every process use the checked file."""
        return {
            "profile": str(self.path.resolve()),
            "sparsity": self.sparsity,
            "sink": self.span.sink,
            "window": self.span.window,
            "sha256": self.profile.sha256(),
        }


def choose_profile(
    name: str,
    sparsity: float | None = None,
    *,
    sink: int | None = None,
    window: int | None = None,
    default_sparsity: float | None = None,
    found: tuple[HeadProfile, Path] | None = None,
) -> ProfileChoice:
    """Find a profile, and check what it is to be served with; None: as the profile says.

    `default_sparsity` is for a profile that recommends none, `found` what `find_profile` gave for
    this name, if it was called before.

    Raises:
        RlkvError: no such profile, it is not valid, no sparsity is known, or a value is out of
            range.
    """
    profile, path = found or find_profile(name)
    known = (sparsity, profile.recommended_sparsity, default_sparsity)
    sparsity = next((share for share in known if share is not None), None)
    if sparsity is None:
        raise RlkvError(
            f"--sparsity is missing and profile {one_line(name)} recommends none: give the share "
            "of KV heads that keep only sink and window, from 0 to 1"
        )
    check_sparsity(sparsity)
    span = resolve_span(sink, window, Span(profile.sink, profile.window))
    return ProfileChoice(name, profile, path, sparsity, span)
