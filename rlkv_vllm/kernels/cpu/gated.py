"""Attention with one gate per KV head over a paged cache, on the CPU.

``out = gate * full + (1 - gate) * local`` (RLKV, arXiv 2510.08525, eq. 3). Full attention sees all
earlier tokens, local attention the first ``sink`` and the last ``window`` of them. Both share their
scores, and the two softmaxes are mixed before the values are summed: keys and values are read once.

Requests with few queries (decode steps, ends of prompts after a prefix hit) run in a compiled loop
over the pages (`gated_loop`). Longer ones gather their keys and use matrix products.

Shape suffixes: N tokens of the step, R requests, Q query heads (``Q = H * G``), H KV heads,
D head_dim, B blocks, C slots of a block, T query tokens that attend together, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkv_vllm.kernels.reference import streaming_mask

#: Queries of one request that attend together: bounds the memory of their scores.
_QUERY_CHUNK = 256

#: Queries of a request up to which the compiled loop is faster than matrix products.
_SHORT = 32


def gated_attention(
    query_NQD: Tensor,
    cache_BHCE: Tensor,
    block_table_RB: Tensor,
    seq_lens_R: Tensor,
    query_start_loc: Tensor,
    gates_H: Tensor,
    out_NQD: Tensor,
    *,
    sink: int,
    window: int,
    scale: float,
) -> None:
    """Attend for all requests of a step; their keys and values are in the cache already.

    Args:
        query_NQD: queries, request by request.
        cache_BHCE: pages, ``E = 2 * D``: the key of a slot, then its value. float32 or bfloat16,
            contiguous.
        block_table_RB: pages of each request, int32.
        seq_lens_R: tokens of each request, those of this step included, int32.
        query_start_loc: ``[R + 1]``, first query of each request, int32.
        gates_H: float32.
        out_NQD: filled in place.
        sink: first tokens that local attention sees.
        window: last tokens that local attention sees, the query's own included.
        scale: factor on ``q @ k``.
    """
    counts_R = query_start_loc.diff()
    is_short_R = counts_R <= _SHORT
    if is_short_R.any():
        from rlkv_vllm.kernels.cpu.gated_loop import attend  # numba takes a second to import

        request_N = torch.repeat_interleave(counts_R)
        asking = is_short_R[request_N].nonzero().flatten()
        request_N = request_N[asking]
        # A query sees the tokens of its request but for those after it.
        lengths_N = seq_lens_R[request_N] - (query_start_loc[request_N + 1] - 1 - asking)
        queries = query_NQD[asking].float() * scale
        outputs = torch.empty_like(queries)
        is_bfloat16 = cache_BHCE.dtype == torch.bfloat16  # NumPy has no such type
        cache = cache_BHCE.view(torch.uint16) if is_bfloat16 else cache_BHCE
        given = (queries, cache, block_table_RB, request_N, lengths_N, gates_H, outputs)
        attend(*(tensor.numpy() for tensor in given), sink, window)
        out_NQD[asking] = outputs.to(out_NQD.dtype)

    num_kv_heads, block_size = cache_BHCE.shape[1:3]
    gates_H111 = gates_H[:, None, None, None]
    for request in (~is_short_R).nonzero().flatten().tolist():
        first, last = query_start_loc[request : request + 2].tolist()
        length = int(seq_lens_R[request])
        pages = cache_BHCE[block_table_RB[request, : -(-length // block_size)].long()]
        rows_HSE = pages.transpose(0, 1).flatten(1, 2)[:, :length].float()
        key_H1SD, value_H1SD = rows_HSE[:, None].chunk(2, -1)
        positions = torch.arange(length)
        for start in range(first, last, _QUERY_CHUNK):
            end = min(start + _QUERY_CHUNK, last)
            q_TQD = query_NQD[start:end].float()
            q_HGTD = q_TQD.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
            asking = positions[length - last + start : length - last + end]
            scores = torch.matmul(q_HGTD, key_H1SD.transpose(-1, -2)) * scale
            scores.masked_fill_(positions > asking[:, None], float("-inf"))
            weights = gates_H111 * scores.softmax(-1)
            scores.masked_fill_(~streaming_mask(asking, positions, sink, window), float("-inf"))
            weights += (1 - gates_H111) * scores.softmax(-1)
            o_TQD = torch.matmul(weights, value_H1SD).permute(2, 0, 1, 3).flatten(1, 2)
            out_NQD[start:end] = o_TQD.to(out_NQD.dtype)


def write_pages(key_NHD: Tensor, value_NHD: Tensor, cache_BHCE: Tensor, slots_N: Tensor) -> None:
    """Write the step's keys and values into their slots of the pages."""
    block_size = cache_BHCE.shape[2]
    block_N = torch.div(slots_N, block_size, rounding_mode="floor")
    rows_NHE = torch.cat((key_NHD, value_NHD), -1).to(cache_BHCE.dtype)
    cache_BHCE[block_N, :, slots_N % block_size] = rows_NHE
