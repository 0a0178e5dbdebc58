"""Sizes in bytes, as flags give and tables show them."""

from __future__ import annotations

from rlkv_vllm.errors import RlkvError


def parse_size(flag: str, text: str) -> int:
    """Bytes of a text such as 8GiB.

    Raises:
        RlkvError: it is no size above 0.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from rlkv_vllm.files import one_line

    given = f"{flag} {one_line(text, 40)}"
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except (ValidationError, OverflowError) as error:
        raise RlkvError(f"{given}: use a size such as 8GiB or 512MiB") from error
    if size < 1:
        raise RlkvError(f"{given}: must be more than 0 bytes, e.g. 8GiB")
    return int(size)


def show_size(size: int) -> str:
    """Bytes in the largest unit that fits."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.4g} {unit}"
    return f"{size} B"
