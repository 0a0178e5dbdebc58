"""Which KV heads keep their full cache at a given sparsity."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from rlkv_vllm.errors import RlkvError


@dataclass(frozen=True)
class Allocation:
    """Full KV heads of every layer (sorted ids), and the rank each head lies on.

    Head ids are global: 0..num_kv_heads-1 in every layer, whatever the rank.
    """

    num_kv_heads: int
    tp_size: int
    full: tuple[tuple[int, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.full)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    @cached_property
    def num_full(self) -> int:
        return sum(len(heads) for heads in self.full)

    @property
    def num_streaming(self) -> int:
        return self.num_heads - self.num_full

    @property
    def sparsity(self) -> float:
        """Share of streaming heads that was reached."""
        return self.num_streaming / self.num_heads

    @property
    def heads_per_rank(self) -> int:
        """KV heads that a rank holds of each layer."""
        return max(1, self.num_kv_heads // self.tp_size)

    def heads_of(self, rank: int) -> range:
        """Ids of the KV heads that `rank` holds of every layer."""
        return heads_of_rank(rank, self.num_kv_heads, self.tp_size)

    def streaming_on(self, rank: int, layer: int) -> tuple[int, ...]:
        """Sorted ids of the layer's streaming heads on `rank`."""
        full = self.full[layer]
        return tuple(head for head in self.heads_of(rank) if head not in full)

    def num_full_on(self, rank: int) -> int:
        """Full heads of all layers on `rank`."""
        return self._full_on_ranks[rank]

    def num_streaming_on(self, rank: int) -> int:
        """Streaming heads of all layers on `rank`."""
        return self.num_layers * self.heads_per_rank - self.num_full_on(rank)

    def digest(self, sink: int, window: int) -> str:
        """SHA-256 of what decides the answers: full heads, sink and window.

        The number of ranks is not part of it. Without streaming heads, sink and window are not.
        """
        parts = [self.full, [sink, window] if self.num_streaming else None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _full_on_ranks(self) -> tuple[int, ...]:
        counts = Counter(chain.from_iterable(self.full))
        return tuple(
            sum(counts[head] for head in self.heads_of(rank)) for rank in range(self.tp_size)
        )


def allocate(gates: Sequence[Sequence[float]], sparsity: float, tp_size: int = 1) -> Allocation:
    """Choose the full heads: those with the highest of the gates, `[layers][KV heads]`.

    Exactly `round(sparsity * heads)` heads become streaming heads (Python's `round`, ties to
    even). Of equal gates the lower layer, then the lower head, stays full. Any number of full
    heads per layer is possible, none and all included.

    A block of the cache costs a rank as many pages as it has full heads, and the rank with
    the most decides how many blocks there are. So with `tp_size` > 1 every rank gets the same
    number of full heads; a remainder goes one by one to the ranks whose next gate is highest,
    of equal ones to the lower rank. Ranks that are a multiple of the KV heads hold copies.

    Raises:
        RlkvError: `sparsity` is no share, `tp_size` does not fit, or gates are ragged or infinite.
    """
    check_sparsity(sparsity)
    num_kv_heads = len(gates[0]) if gates else 0
    if not num_kv_heads or any(len(row) != num_kv_heads for row in gates):
        raise RlkvError("gates must be a table [layers][KV heads] with rows of equal length")
    if not all(math.isfinite(gate) for row in gates for gate in row):
        raise RlkvError("gates must be finite numbers in [0, 1]: make the profile again")
    if tp_size < 1 or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        raise RlkvError(
            f"--tp {tp_size}: must divide the {num_kv_heads} KV heads per layer, or be a "
            "multiple of them"
        )
    total = len(gates) * num_kv_heads
    num_full = total - round(sparsity * total)
    # Ranks that hold copies of the same heads share one ranking.
    owners = min(tp_size, num_kv_heads)
    ranked = [
        sorted(
            (-gates[layer][head], layer, head)
            for layer in range(len(gates))
            for head in heads_of_rank(owner, num_kv_heads, owners)
        )
        for owner in range(owners)
    ]
    share, remainder = divmod(num_full, owners)
    by_next_gate = sorted(
        range(owners), key=lambda owner: ranked[owner][share][0] if remainder else 0.0
    )
    full: list[list[int]] = [[] for _ in gates]
    for place, owner in enumerate(by_next_gate):
        for _, layer, head in ranked[owner][: share + (place < remainder)]:
            full[layer].append(head)
    return Allocation(num_kv_heads, tp_size, tuple(tuple(sorted(heads)) for heads in full))


def read_sparsities(text: str, flag: str) -> list[float]:
    """Sparsities in [0, 1] separated by commas, as a flag gives them."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise RlkvError(
            f"{flag} {text!r}: give numbers from 0 to 1 separated by commas, e.g. 0,.4,.5"
        ) from None
    for share in shares:
        check_sparsity(share)
    return shares


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity that is no number in [0, 1]."""
    is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not (is_number and 0 <= sparsity <= 1):
        raise RlkvError(
            f"--sparsity {sparsity}: must be a share of the KV heads in [0, 1], e.g. 0.5"
        )


def heads_of_rank(rank: int, num_kv_heads: int, tp_size: int) -> range:
    """Ids of a rank's KV heads; with more ranks than heads, several ranks hold the same head."""
    first = rank * num_kv_heads // tp_size
    return range(first, first + max(1, num_kv_heads // tp_size))
