"""The compiled loop of :mod:`rlkv_vllm.kernels.cpu.gated`: one query of one request at a time.

The functions are top-level, since Numba does not cache functions that call another one through a
closure. Sizes are not constants: LLVM would unroll the loops over them instead of vectorising.

Shape suffixes as there.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

_compiled: Any = numba.njit(cache=True, nogil=True, fastmath={"contract"})
#: Sums may be reordered, so that they are vectorised; infinities stay what they are.
_reordered: Any = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


def _number(stored: Any) -> Any:
    """The number in a cache of float32 or of the bits of bfloat16, as float32."""
    raise NotImplementedError  # compiled code has the overload


@overload(_number, inline="always")
def _number_of(stored):  # type: ignore[no-untyped-def]  # Numba compares the signatures
    if isinstance(stored, types.Float):
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


# Compilers do not vectorise exp: this is 2**n * 2**r with |r| <= 1/2, n in the bits of the exponent
# and a polynomial for the rest, accurate to 2e-7.
@_compiled  # type: ignore[untyped-decorator]
def _exp_of(
    source: Any, to: Any, scale_bits: Any, scale_of: Any, top: Any, start: int, end: int
) -> None:
    for s in range(start, end):
        x = max(source[s] - top, np.float32(-87))
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        scale_bits[s] = (np.int32(n) + np.int32(127)) << np.int32(23)
        to[s] = (p * r * r + r + np.float32(1)) * scale_of[s]


@_reordered  # type: ignore[untyped-decorator]
def attend(
    query_NQD: Any,
    cache_BHCE: Any,
    block_table_RB: Any,
    request_N: Any,
    lengths_N: Any,
    gates_H: Any,
    out_NQD: Any,
    sink: int,
    window: int,
) -> None:
    """Attend for single queries.

    Query ``i`` sees the first ``lengths_N[i]`` tokens of request ``request_N[i]``. Queries are
    scaled float32, the cache is float32 or the bits of bfloat16 (uint16); the output is filled.
    """
    num_queries, num_q_heads, size = query_NQD.shape
    num_kv_heads, block_size = cache_BHCE.shape[1], cache_BHCE.shape[2]
    group = num_q_heads // num_kv_heads
    longest = 0
    for i in range(num_queries):
        longest = max(longest, lengths_N[i])
    values = np.empty((longest, size), np.float32)
    weights = np.empty((group, longest), np.float32)
    local = np.empty(longest, np.float32)
    scale_bits = np.empty(longest, np.int32)
    scale_of = scale_bits.view(np.float32)
    query = np.empty((group, size), np.float32)
    for i in range(num_queries):
        length = lengths_N[i]
        blocks = block_table_RB[request_N[i]]
        early = min(sink, length)
        recent = max(early, length - window)
        for h in range(num_kv_heads):
            gate = gates_H[h]
            for g in range(group):
                for d in range(size):
                    query[g, d] = query_NQD[i, h * group + g, d]
            start = 0
            while start < length:
                page = cache_BHCE[blocks[start // block_size], h]
                for slot in range(min(block_size, length - start)):
                    s = start + slot
                    row = page[slot]
                    for g in range(group):
                        dot = np.float32(0)
                        for d in range(size):
                            dot += query[g, d] * _number(row[d])
                        weights[g, s] = dot
                    # The value follows its key in memory: copied now, it is near later.
                    for d in range(size):
                        values[s, d] = _number(row[size + d])
                start += block_size
            for g in range(group):
                scores = weights[g]
                top = top_local = np.float32(-np.inf)
                for s in range(length):
                    top = max(top, scores[s])
                for s in range(early):
                    top_local = max(top_local, scores[s])
                for s in range(recent, length):
                    top_local = max(top_local, scores[s])
                _exp_of(scores, local, scale_bits, scale_of, top_local, 0, early)
                _exp_of(scores, local, scale_bits, scale_of, top_local, recent, length)
                _exp_of(scores, scores, scale_bits, scale_of, top, 0, length)
                total = total_local = np.float32(0)
                for s in range(length):
                    total += scores[s]
                for s in range(early):
                    total_local += local[s]
                for s in range(recent, length):
                    total_local += local[s]
                full = gate / total
                for s in range(length):
                    scores[s] *= full
                rest = (np.float32(1) - gate) / total_local
                for s in range(early):
                    scores[s] += rest * local[s]
                for s in range(recent, length):
                    scores[s] += rest * local[s]
                out = out_NQD[i, h * group + g]
                for d in range(size):
                    out[d] = np.float32(0)
                for s in range(length):
                    weight = scores[s]
                    for d in range(size):
                        out[d] += weight * values[s, d]
