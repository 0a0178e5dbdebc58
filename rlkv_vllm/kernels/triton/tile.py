"""One tile of keys against one tile of queries: the step that decode and prefill share.

Shape suffixes: M rows of queries, N keys, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(q, k, v, visible, m, norm, acc, scale_log2):
    """Online softmax over one more tile of keys.

    Args:
        q: ``[M, D]`` queries.
        k: ``[D, N]`` keys, transposed.
        v: ``[N, D]`` values.
        visible: ``[M, N]``, which query sees which key.
        m: ``[M]`` running maximum of the scores, in units of log2.
        norm: ``[M]`` running sum of ``2 ** (score - m)``.
        acc: ``[M, D]`` running sum of weighted values, not normalised.
        scale_log2: softmax scale times log2(e).

    Returns:
        New ``m``, ``norm`` and ``acc``.
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
    """Keys ``[D, N]``, transposed, and values ``[N, D]``; rows that do not exist are 0.

    Args:
        keys: pointer to the keys of a head.
        values: pointer to its values.
        key_rows: ``[N]`` element offsets.
        value_rows: ``[N]`` element offsets.
        exists: ``[N]``, which rows are loaded.
        d: ``[D]`` element numbers, padded.
        in_d: ``[D]``, which of them exist.
    """
    k = tl.load(
        keys + key_rows[None, :] + d[:, None], mask=exists[None, :] & in_d[:, None], other=0.0
    )
    v = tl.load(
        values + value_rows[:, None] + d[None, :], mask=exists[:, None] & in_d[None, :], other=0.0
    )
    return k, v
