"""Block arithmetic of a ring, the bounded cache of a streaming head. It stands nowhere else."""

from __future__ import annotations


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`, the last one perhaps in part."""
    return -(-num_tokens // block_size)


def window_blocks(window: int, block_size: int) -> int:
    """Most blocks that the last `window` tokens touch: they may begin anywhere in a block."""
    return num_blocks(window - 1, block_size) + 1


def ring_blocks(
    num_tokens: int, sink: int, window: int, block_size: int, *, num_windows: int = 1
) -> int:
    """Most blocks that a request ever holds in a ring group.

    Its sink blocks stay. A decoding request holds one window. While chunks of a prompt are
    computed, it also holds the window before each chunk: chunk positions that are out of the
    window when the chunk ends are never allocated, so the length of a chunk does not matter.
    `num_windows` is 1 for a decoding request, during prefill 1 + the steps in flight.
    """
    ring = num_blocks(sink, block_size) + num_windows * window_blocks(window, block_size)
    return min(num_blocks(num_tokens, block_size), ring)
