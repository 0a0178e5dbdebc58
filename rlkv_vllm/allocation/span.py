"""What a streaming head keeps: its first tokens (sink) and its last ones (window)."""

from __future__ import annotations

from typing import NamedTuple

from rlkv_vllm.errors import RlkvError


class Span(NamedTuple):
    """Sink and window of streaming heads.

    Attributes:
        sink: first tokens.
        window: last tokens, the query's own included.
    """

    sink: int
    window: int


#: Published settings (arXiv 2510.08525): to serve with, and of local attention in training.
SERVING_SPAN, TRAINING_SPAN = Span(16, 64), Span(128, 256)


def resolve_span(
    sink: int | None,
    window: int | None,
    default: Span,
    *,
    flags: tuple[str, str] = ("--sink", "--window"),
) -> Span:
    """Sink and window: what the user gave, else the default.

    Args:
        sink: given by the user, or None.
        window: given by the user, or None.
        default: of the profile, the model or the purpose.
        flags: what the user calls them, for errors.

    Raises:
        RlkvError: a negative sink, or a window below 1.
    """
    if sink is not None and sink < 0:
        raise RlkvError(f"{flags[0]} {sink}: must be 0 or more tokens")
    if window is not None and window < 1:
        raise RlkvError(f"{flags[1]} {window}: must be 1 or more tokens")
    return Span(
        default.sink if sink is None else sink, default.window if window is None else window
    )
