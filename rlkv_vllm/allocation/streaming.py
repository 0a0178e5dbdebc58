"""Sets of streaming heads, however they were found."""

from __future__ import annotations

from collections.abc import Collection, Iterable

#: A KV head: its layer, and its number in it.
Head = tuple[int, int]
#: The streaming heads of an allocation, sorted.
Streaming = tuple[Head, ...]


def full_heads(streaming: Collection[Head], layers: int, kv_heads: int) -> list[list[int]]:
    """The heads of every layer that do not stream."""
    return [[j for j in range(kv_heads) if (i, j) not in streaming] for i in range(layers)]


def name_of(streaming: Iterable[Head]) -> str:
    """The set in a word, for files: ``"0.1 2.3"`` for head 1 of layer 0 and head 3 of layer 2."""
    return " ".join(f"{layer}.{head}" for layer, head in sorted(streaming))
