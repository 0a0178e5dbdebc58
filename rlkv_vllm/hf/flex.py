"""Attention with full and streaming heads on `torch.nn.attention.flex_attention`.

A streaming head touches only the key blocks that hold its sink and its window, so its work grows
with the number of queries and not with its square.

Shape suffixes: B sequences, T query tokens, S key tokens, H KV heads, Q query heads, D head_dim,
M blocks of queries, N blocks of keys; X is Q, or 1 where all query heads are alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rlkv_vllm.errors import RlkvError

#: Tokens per block of queries and of keys: flex_attention's default.
BLOCK = 128

# Window of a full head. Half of int32's range: `seen - window` must not overflow.
_EVERYTHING = 2**30
# More than any number of tokens: the rank of a block without keys, or of a query that is not there.
_NEVER = 2**31 - 1


class BlockMasks:
    """Which keys the queries of one forward pass see, as block masks, shared by the layers.

    Keys are counted per sequence over real tokens only, as `local_mask` does, so that the sink
    is a row's first real tokens under padding on either side. Causality: a query sees a key whose
    rank is at most the number of real keys up to the query.

    Whether a block is visible follows from its lowest and highest rank: no mask of all T x S pairs.

    Args:
        real_BS: boolean, False for padding; first the tokens of the cache, then the queries.
        num_queries: T, the last of the S tokens.
    """

    def __init__(self, real_BS: torch.Tensor, num_queries: int) -> None:
        total_BS = real_BS.cumsum(-1, dtype=torch.int32)
        self._rank_BS = torch.where(real_BS, total_BS, 0)
        self._seen_BT = total_BS[:, -num_queries:].contiguous()
        self._made: dict[tuple[object, ...], BlockMask] = {}

    def get(
        self, full_heads: tuple[bool, ...], sink: int, window: int, device: torch.device
    ) -> BlockMask:
        """The block mask of a layer on `device`; `full_heads` has a value per query head."""
        key = (full_heads, sink, window, device)
        if key not in self._made:
            ranks = self._rank_BS.to(device), self._seen_BT.to(device)
            self._made[key] = _block_mask(*ranks, full_heads, sink, window)
        return self._made[key]


def attend(
    query_BQTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    mask: BlockMask,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Attention of one layer without dropout, compiled on a GPU; returns ``[B, T, Q, D]``.

    On the CPU, for tests, it computes all T x S scores and refuses a backward pass.
    """
    if dropout:
        raise RlkvError(
            f"attention dropout {dropout}: flex attention has none: set `attention_dropout` to 0 "
            'in config.json, or attach gates with backend="sdpa"'
        )
    if query_BQTD.device.type == "cpu":
        if any(x.requires_grad for x in (query_BQTD, key_BHSD, value_BHSD)):
            raise RlkvError(
                "flex attention has no gradients on the CPU: attach gates with "
                'backend="sdpa" (or "auto") to train there'
            )
        function = flex_attention
    else:
        function = _compiled()
    # Torch compiles anew for a first and a later layer, with and without gradients, for one and
    # many sequences or blocks, for heads alike and mixed: more often than the 8 times it allows.
    with torch._dynamo.config.patch(recompile_limit=64):
        out_BQTD: torch.Tensor = function(
            query_BQTD, key_BHSD, value_BHSD, block_mask=mask, scale=scaling, enable_gqa=True
        )
    return out_BQTD.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # dynamic: one kernel for all lengths. fullgraph: an error where torch cannot compile; its
    # fallback computes all T x S scores and runs out of memory.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_mask(
    rank_BS: torch.Tensor,
    seen_BT: torch.Tensor,
    full_heads: tuple[bool, ...],
    sink: int,
    window: int,
) -> BlockMask:
    full_Q = torch.tensor(full_heads, device=rank_BS.device)
    # One rule for full and streaming heads, numbers in tensors: flex_attention is compiled once
    # for both and for any sink and window.
    window_Q = torch.where(full_Q, _EVERYTHING, window).int()
    sink_Q = torch.full_like(window_Q, sink)

    def visible(b: torch.Tensor, q: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        rank, seen = rank_BS[b, s], seen_BT[b, t]
        near = (rank <= sink_Q[q]) | (rank > seen - window_Q[q])
        return (rank > 0) & (rank <= seen) & near

    alike = len(set(full_heads)) == 1
    window_X11 = (window_Q[:1] if alike else window_Q)[:, None, None]

    # Of keys: the lowest rank of a real one, the highest rank, the lowest with padding as 0.
    real_BS = torch.where(rank_BS > 0, rank_BS, _NEVER)
    low_B11N = _blocks(real_BS, _NEVER).amin(-1)[:, None, None]
    high_B11N = _blocks(rank_BS, 0).amax(-1)[:, None, None]
    least_B11N = _blocks(rank_BS, 0).amin(-1)[:, None, None]
    # Of queries: a block that reaches beyond the last query is never entirely visible.
    min_BM1 = _blocks(seen_BT, _EVERYTHING).amin(-1)[:, None, :, None]
    max_BM1 = _blocks(seen_BT, 0).amax(-1)[:, None, :, None]
    least_BM1 = _blocks(seen_BT, 0).amin(-1)[:, None, :, None]

    some_BXMN = (low_B11N <= max_BM1) & ((low_B11N <= sink) | (high_B11N > min_BM1 - window_X11))
    all_BXMN = (
        (least_B11N > 0)
        & (high_B11N <= least_BM1)
        & ((high_B11N <= sink) | (least_B11N > max_BM1 - window_X11))
    )
    return BlockMask.from_kv_blocks(
        *_indices(some_BXMN & ~all_BXMN),
        *_indices(all_BXMN),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(seen_BT.shape[1], rank_BS.shape[1]),
    )


def _blocks(x_BT: torch.Tensor, fill: int) -> torch.Tensor:
    """Cut into blocks, ``[B, M, BLOCK]``, the last one filled up."""
    return F.pad(x_BT, (0, -x_BT.shape[1] % BLOCK), value=fill).unflatten(1, (-1, BLOCK))


def _indices(blocks_BXMN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of key blocks per query block, and their indices in front of the others'."""
    count_BXM = blocks_BXMN.sum(-1, dtype=torch.int32)
    index_BXMN = blocks_BXMN.int().argsort(dim=-1, descending=True, stable=True)
    return count_BXM, index_BXMN.int()
