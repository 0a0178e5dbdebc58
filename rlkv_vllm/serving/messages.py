"""Other people's errors as one line for the user."""

from __future__ import annotations

from pydantic import ValidationError

from rlkv_vllm.files import one_line

_LIMIT = 400


def reason(error: BaseException) -> str:
    """What an error of vLLM, pydantic or the system says, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        return one_line(f"{where}: {message}" if where else message, _LIMIT)
    if isinstance(error, KeyError) and error.args:  # str() would quote it
        return one_line(error.args[0], _LIMIT)
    return one_line(error, _LIMIT) or type(error).__name__
