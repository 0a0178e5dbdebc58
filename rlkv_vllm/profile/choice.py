"""A head profile as it is served: the file, the sparsity, sink and window."""

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
    """A profile with the options it is served with, all checked.

    Attributes:
        name: what the user called the profile.
        profile: its content.
        path: the local file it was read from.
        sparsity: share of streaming KV heads.
        span: sink and window of the streaming heads.
    """

    name: str
    profile: HeadProfile
    path: Path
    sparsity: float
    span: Span

    def engine_config(self) -> dict[str, Any]:
        """``additional_config["rlkv"]``: every process reads the very file that was checked."""
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
    """Find a profile, and check what it is to be served with.

    Args:
        name: what `find_profile` takes.
        sparsity: share of streaming KV heads; None: what the profile recommends.
        sink: first tokens that streaming heads keep; None: the profile's.
        window: last tokens that streaming heads keep; None: the profile's.
        default_sparsity: of a profile that recommends none.
        found: what `find_profile` gave for this name, if it was called before.

    Raises:
        RlkvError: no such profile, it is not valid, no sparsity is known, or a value is out of
            range.
    """
    profile, path = found or find_profile(name)
    if sparsity is None:
        sparsity = profile.recommended_sparsity
    if sparsity is None:
        sparsity = default_sparsity
    if sparsity is None:
        raise RlkvError(
            f"--sparsity is missing and profile {one_line(name)} recommends none: give the share "
            "of KV heads that keep only sink and window, from 0 to 1"
        )
    check_sparsity(sparsity)
    span = resolve_span(sink, window, Span(profile.sink, profile.window))
    return ProfileChoice(name, profile, path, sparsity, span)
