"""What a streaming head keeps: its first tokens (sink) and its last ones (window)."""

from __future__ import annotations

from typing import NamedTuple

from rlkv_vllm.errors import RlkvError


class Span(NamedTuple):
    """Sink and window of streaming heads (tokens); the window includes the query's own."""

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
    """Sink and window: what the user gave under these `flags`, else the default.

    Refuses a negative sink, a window below 1, and more than the kernels' integers hold.
    """
    for flag, given, least in ((flags[0], sink, 0), (flags[1], window, 1)):
        if given is not None and not least <= given < 2**31:
            raise RlkvError(f"{flag} {given}: must be {least} or more tokens, and below 2^31")
    return Span(
        default.sink if sink is None else sink, default.window if window is None else window
    )
