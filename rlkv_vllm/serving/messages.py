"""Errors of vLLM, pydantic and the system as one line for the user."""

from __future__ import annotations

from pydantic import ValidationError

from rlkv_vllm.files import one_line

_LIMIT = 400


def reason(error: BaseException) -> str:
    """The message of `error` on one line; its type where it has none."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        return one_line(f"{where}: {message}" if where else message, _LIMIT)
    if isinstance(error, KeyError) and error.args:  # str() would quote it
        return one_line(error.args[0], _LIMIT)
    return one_line(error, _LIMIT) or type(error).__name__
