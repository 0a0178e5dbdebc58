"""Attention on the GPU with full and streaming heads in one layer: what the engine calls.

`write`, `decode` and `prefill` are one launch each for all heads of a layer; a launch depends on
shapes alone.

Shape suffixes: N tokens of the step, R requests, B blocks of a table, Q query heads, H KV heads,
D head_dim.
"""

from __future__ import annotations

import math

from torch import Tensor

from rlkv_vllm.kernels.triton.decode import DecodeConfig, Workspace, decode, decode_config
from rlkv_vllm.kernels.triton.layer_cache import LayerCache, StepRequests
from rlkv_vllm.kernels.triton.prefill import PrefillConfig, prefill, prefill_config
from rlkv_vllm.kernels.triton.write import write_cache

__all__ = ["LayerCache", "Workspace", "split_attention", "write_cache"]


def split_attention(
    query_NQD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    output_NQD: Tensor,
    cache: LayerCache,
    *,
    full_table_RB: Tensor,
    ring_table_RB: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    workspace: Workspace,
    sink: int,
    window: int,
    scale: float,
    gates_H: Tensor | None = None,
    decode_with: DecodeConfig | None = None,
    prefill_with: PrefillConfig | None = None,
) -> None:
    """Attend after :func:`write_cache` wrote the step.

    A key ``k`` is visible to query ``q`` iff ``k <= q``, and for streaming heads also
    ``k < sink or k > q - window``. Keys before a request's new tokens are read from the pages; its
    new ones from ``key_NHD`` and ``value_NHD``, or from the pages where there is one. Pages of
    invisible positions are never read: entries of a block table that left the window may be stale.

    A layer without full (streaming) heads gives the other table in that place. With gates every
    head is a streaming head whose pages hold all tokens, and its output is
    ``gate * full + (1 - gate) * local``.

    Args:
        query_NQD: dense in the last dimension, as all of the step's tensors.
        key_NHD: keys of the step's tokens.
        value_NHD: values, as the keys.
        output_NQD: written at the rows of all requests; rows of padding are left alone.
        cache: the layer's cache.
        full_table_RB: int32, pages of full heads; the last dimension is dense.
        ring_table_RB: int32, pages of streaming heads.
        query_start_loc: int32 ``[R + 1]``, first row of each request; two equal values are padding.
        seq_lens: int32 ``[R]``, tokens of each request after this step.
        max_query_len: most new tokens of a request, known on the host.
        workspace: shared by all layers.
        sink: first tokens that a streaming head sees.
        window: last tokens that a streaming head sees, the query's own included.
        scale: factor on ``q @ k``.
        gates_H: float32, one per KV head, in gated mode.
        decode_with: launch parameters of decode instead of the default ones.
        prefill_with: the same of prefill.
    """
    head_dim, itemsize = query_NQD.shape[2], query_NQD.element_size()
    scale_log2 = scale * math.log2(math.e)
    step = StepRequests(
        gates_H, full_table_RB, ring_table_RB, query_start_loc, seq_lens, sink, window, scale_log2
    )
    config = decode_with or decode_config(head_dim, itemsize)
    decode(query_NQD, output_NQD, cache, step, workspace=workspace, config=config)
    if max_query_len > 1:
        gated = gates_H is not None
        prefill_with = prefill_with or prefill_config(
            head_dim, itemsize, workspace.capability, gated=gated
        )
        prefill(query_NQD, key_NHD, value_NHD, output_NQD, cache, step, config=prefill_with)
