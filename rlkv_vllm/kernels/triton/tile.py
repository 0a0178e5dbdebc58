"""What the kernels of decode and prefill share: a head's keys, and a tile of them.

Shape suffixes: M rows of queries, N keys, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_view(
    request, streaming, full_table, ring_table, full_stride, ring_stride, seq_len, sink, window
):
    """Block table, sink and window of a head.

    A full head is a streaming head without sinks whose window holds everything.
    """
    if streaming:
        table = ring_table + request.to(tl.int64) * ring_stride
    else:
        table = full_table + request.to(tl.int64) * full_stride
    return table, tl.where(streaming, sink, 0), tl.where(streaming, window, seq_len)


@triton.jit
def attend_tile(q, k, v, visible, m, norm, acc, scale_log2):
    """Online softmax of queries ``q [M, D]`` over one more tile, ``k [D, N]`` and ``v [N, D]``.

    ``m [M]`` is the running maximum of the scores in units of log2, ``norm [M]`` the sum of
    ``2 ** (score - m)``, ``acc [M, D]`` the sum of weighted values, not normalised. ``scale_log2``
    is the factor on ``q @ k`` times log2(e).
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # A query that has seen no key yet: all its scores are -inf, and -inf - -inf is NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - m_safe[:, None])
    shrink = tl.exp2(m - m_safe)
    norm_new = norm * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, norm_new, acc


@triton.jit
def page_rows(table, positions, mask, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr):
    """Element offsets of tokens in a head's pages; masked positions are not looked up."""
    block = tl.load(table + positions // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    return block * block_stride + (positions % BLOCK_SIZE) * slot_stride


@triton.jit
def load_tile(keys, values, key_rows, value_rows, exists, d, in_d):
    """Keys ``[D, N]``, transposed, and values ``[N, D]`` of a head; rows that do not exist are 0.

    Rows are element offsets from the pointers. ``d`` are element numbers, padded; ``in_d`` tells
    which exist.
    """
    k = tl.load(
        keys + key_rows[None, :] + d[:, None], mask=exists[None, :] & in_d[:, None], other=0.0
    )
    v = tl.load(
        values + value_rows[:, None] + d[None, :], mask=exists[:, None] & in_d[None, :], other=0.0
    )
    return k, v
