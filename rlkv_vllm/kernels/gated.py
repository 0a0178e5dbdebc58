"""Attention with one gate per KV head over a paged cache, on the CPU.

``out = gate * full + (1 - gate) * local`` (RLKV, arXiv 2510.08525, eq. 3), where full attention
sees all earlier tokens and local attention the first ``sink`` and the last ``window`` of them.
Both share their scores, and the two softmaxes are mixed before the values are summed, so that
keys and values are read once.

Decode tokens, the many of a rollout, go through a compiled loop over the pages; longer queries
gather their keys and use matrix products.

Shape suffixes: N tokens of the step, R requests, Q query heads (``Q = H * G``), H KV heads,
D head_dim, C slots of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlkv_vllm.kernels.reference import streaming_mask

#: Queries of one request that attend together: bounds the memory of their scores.
_QUERY_CHUNK = 256

#: Types of cache, and how far left their bits stand when taken for the upper bits of a float32.
_BITS = {torch.float32: (torch.uint32, 0), torch.bfloat16: (torch.uint16, 16)}


def gated_attention(
    query_NQD: torch.Tensor,
    cache_BHCE: torch.Tensor,
    block_table_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    query_start_loc: torch.Tensor,
    gates_H: torch.Tensor,
    out_NQD: torch.Tensor,
    *,
    sink: int,
    window: int,
    scale: float,
) -> None:
    """Attend for all requests of a step; their keys and values are in the cache already.

    Args:
        query_NQD: queries, request by request.
        cache_BHCE: pages, ``E = 2 * D``: a slot's key and then its value. float32 or bfloat16,
            contiguous.
        block_table_RB: pages of each request, int32.
        seq_lens_R: tokens of each request, those of this step included, int32.
        query_start_loc: ``[R + 1]``, where each request's queries begin, int32.
        gates_H: float32.
        out_NQD: filled in place.
        sink: first tokens that local attention sees.
        window: last tokens that local attention sees, the query's own included.
        scale: factor on ``q @ k``.
    """
    lengths_R = query_start_loc.diff()
    decode_R = (lengths_R == 1).nonzero().flatten()
    if len(decode_R):
        tokens = query_start_loc[decode_R].long()
        bits, shift = _BITS[cache_BHCE.dtype]
        queries = query_NQD[tokens].float()
        outputs = torch.empty_like(queries)
        _decode()(
            queries.numpy(),
            cache_BHCE.view(bits).numpy(),
            shift,
            block_table_RB[decode_R].numpy(),
            seq_lens_R[decode_R].numpy(),
            gates_H.numpy(),
            outputs.numpy(),
            sink,
            window,
            scale,
        )
        out_NQD[tokens] = outputs.to(out_NQD.dtype)
    for request in (lengths_R > 1).nonzero().flatten().tolist():
        first, last = query_start_loc[request : request + 2].tolist()
        _prefill(
            query_NQD[first:last],
            cache_BHCE,
            block_table_RB[request],
            int(seq_lens_R[request]),
            gates_H,
            out_NQD[first:last],
            sink=sink,
            window=window,
            scale=scale,
        )


def _prefill(
    query_TQD: torch.Tensor,
    cache_BHCE: torch.Tensor,
    block_table_B: torch.Tensor,
    length: int,
    gates_H: torch.Tensor,
    out_TQD: torch.Tensor,
    *,
    sink: int,
    window: int,
    scale: float,
) -> None:
    num_tokens, _, size = query_TQD.shape
    num_kv_heads, block_size = cache_BHCE.shape[1:3]
    pages = cache_BHCE[block_table_B[: -(-length // block_size)].long()]
    rows_HSE = pages.transpose(0, 1).flatten(1, 2)[:, :length].float()
    key_H1SD, value_H1SD = rows_HSE[:, None].split(size, -1)
    gates_H111 = gates_H[:, None, None, None]
    positions = torch.arange(length)
    for start in range(0, num_tokens, _QUERY_CHUNK):
        q_TQD = query_TQD[start : start + _QUERY_CHUNK].float()
        q_HGTD = q_TQD.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        asking = positions[length - num_tokens + start :][: len(q_TQD)]
        scores = torch.matmul(q_HGTD, key_H1SD.transpose(-1, -2)) * scale
        scores.masked_fill_(positions > asking[:, None], float("-inf"))
        weights = gates_H111 * scores.softmax(-1)
        scores.masked_fill_(~streaming_mask(asking, positions, sink, window), float("-inf"))
        weights += (1 - gates_H111) * scores.softmax(-1)
        o_TQD = torch.matmul(weights, value_H1SD).permute(2, 0, 1, 3).flatten(1, 2)
        out_TQD[start : start + _QUERY_CHUNK] = o_TQD.to(out_TQD.dtype)


@functools.cache
def _decode() -> Callable[..., None]:
    """The loop over the pages, compiled when it is first needed and kept on disk."""
    import numba

    # Compilers make no vectors of exp: this is 2**n * 2**r with |r| <= 1/2, n in the exponent's
    # bits and a polynomial for the rest, right to 2e-7.
    @numba.njit(cache=True, nogil=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
    def exp_of(
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

    # Sums may be reordered, which is what makes vectors of them; infinities stay what they are.
    @numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
    def decode(
        query_RQD: Any,
        bits_BHCE: Any,
        shift: int,
        block_table_RB: Any,
        seq_lens_R: Any,
        gates_H: Any,
        out_RQD: Any,
        sink: int,
        window: int,
        scale: float,
    ) -> None:
        num_requests, num_q_heads, size = query_RQD.shape
        num_kv_heads, block_size = bits_BHCE.shape[1], bits_BHCE.shape[2]
        group = num_q_heads // num_kv_heads
        longest = 0
        for r in range(num_requests):
            longest = max(longest, seq_lens_R[r])
        weights = np.empty((group, longest), np.float32)
        local = np.empty(longest, np.float32)
        scale_bits = np.empty(longest, np.int32)
        scale_of = scale_bits.view(np.float32)
        row_bits = np.empty(size, np.uint32)
        row = row_bits.view(np.float32)
        for r in range(num_requests):
            length = seq_lens_R[r]
            early = min(sink, length)
            recent = max(early, length - window)
            for h in range(num_kv_heads):
                gate = gates_H[h]
                for s in range(length):
                    block, slot = block_table_RB[r, s // block_size], s % block_size
                    for d in range(size):
                        row_bits[d] = np.uint32(bits_BHCE[block, h, slot, d]) << np.uint32(shift)
                    for g in range(group):
                        dot = np.float32(0)
                        for d in range(size):
                            dot += query_RQD[r, h * group + g, d] * row[d]
                        weights[g, s] = dot * np.float32(scale)
                for g in range(group):
                    scores = weights[g]
                    top = top_local = np.float32(-np.inf)
                    for s in range(length):
                        top = max(top, scores[s])
                    for s in range(early):
                        top_local = max(top_local, scores[s])
                    for s in range(recent, length):
                        top_local = max(top_local, scores[s])
                    exp_of(scores, local, scale_bits, scale_of, top_local, 0, early)
                    exp_of(scores, local, scale_bits, scale_of, top_local, recent, length)
                    exp_of(scores, scores, scale_bits, scale_of, top, 0, length)
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
                    for d in range(size):
                        out_RQD[r, h * group + g, d] = np.float32(0)
                for s in range(length):
                    block, slot = block_table_RB[r, s // block_size], s % block_size
                    for d in range(size):
                        row_bits[d] = np.uint32(bits_BHCE[block, h, slot, size + d]) << np.uint32(
                            shift
                        )
                    for g in range(group):
                        weight = weights[g, s]
                        for d in range(size):
                            out_RQD[r, h * group + g, d] += weight * row[d]

    compiled: Callable[..., None] = decode
    return compiled


def write_pages(
    key_NHD: torch.Tensor,
    value_NHD: torch.Tensor,
    cache_BHCE: torch.Tensor,
    slots_N: torch.Tensor,
) -> None:
    """Write the step's keys and values into their slots of the pages."""
    block_size = cache_BHCE.shape[2]
    block_N = torch.div(slots_N, block_size, rounding_mode="floor")
    rows_NHE = torch.cat((key_NHD, value_NHD), -1).to(cache_BHCE.dtype)
    cache_BHCE[block_N, :, slots_N % block_size] = rows_NHE
