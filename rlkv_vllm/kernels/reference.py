"""Attention with full and streaming heads in plain torch: the oracle of all other kernels.

Written to be read, not to be fast.

Shape suffixes: T query tokens, S key tokens, H KV heads, Q query heads (``Q = H * G``), D head_dim.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def streaming_mask(q_pos_T: Tensor, k_pos_S: Tensor, sink: int, window: int) -> Tensor:
    """Boolean ``[T, S]``: which keys a streaming head sees, by absolute positions.

    Key ``k`` is visible to query ``q`` iff ``k <= q and (k < sink or k > q - window)``: the first
    ``sink`` tokens and the last ``window``, the query's own included.
    """
    q, k = q_pos_T[:, None], k_pos_S[None, :]
    return (k <= q) & ((k < sink) | (k > q - window))


def head_mask(
    q_pos_T: Tensor,
    k_pos_S: Tensor,
    num_kv_heads: int,
    full_heads: Collection[int],
    sink: int,
    window: int,
) -> Tensor:
    """Boolean ``[H, T, S]``: causal for full heads, sink and window for the others."""
    causal_TS = k_pos_S[None, :] <= q_pos_T[:, None]
    streaming_TS = streaming_mask(q_pos_T, k_pos_S, sink, window)
    return torch.stack(
        [causal_TS if h in full_heads else streaming_TS for h in range(num_kv_heads)]
    )


def reference_attention(
    q_TQD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    *,
    full_heads: Collection[int],
    sink: int,
    window: int,
    scale: float,
) -> Tensor:
    """Attention of one request's last ``T`` tokens over all its ``S`` tokens.

    Args:
        q_TQD: queries of positions ``S - T .. S - 1``.
        k_SHD: keys of positions ``0 .. S - 1``.
        v_SHD: values, as the keys.
        full_heads: KV heads that see all earlier tokens.
        sink: first tokens kept by a streaming head.
        window: last tokens kept by a streaming head.
        scale: factor on ``q @ k``.

    Returns:
        ``[T, Q, D]`` in the dtype of the queries; computed in float32 (float64 for float64 input).
    """
    T, Q, _ = q_TQD.shape
    S, H, _ = k_SHD.shape
    compute = torch.promote_types(q_TQD.dtype, torch.float32)
    group = Q // H
    k_QSD = k_SHD.to(compute).permute(1, 0, 2).repeat_interleave(group, 0)
    v_QSD = v_SHD.to(compute).permute(1, 0, 2).repeat_interleave(group, 0)
    scores_QTS = torch.matmul(q_TQD.to(compute).permute(1, 0, 2), k_QSD.transpose(1, 2)) * scale
    positions = torch.arange(S, device=q_TQD.device)
    mask_HTS = head_mask(positions[S - T :], positions, H, full_heads, sink, window)
    scores_QTS = scores_QTS.masked_fill(~mask_HTS.repeat_interleave(group, 0), float("-inf"))
    return torch.matmul(scores_QTS.softmax(-1), v_QSD).permute(1, 0, 2).to(q_TQD.dtype)
