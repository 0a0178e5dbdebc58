"""vLLM's C++ paged attention, called with the heads, tables and layout that a split cache needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm import _custom_ops as ops
from vllm import envs


class PagedCache:
    """The caches of some KV heads as the operators take them.

    Args:
        pages: ``[pages, heads, page_size, 2 * head_dim]``; a page of a head is dense.
        isa: vLLM's name of the kernel, which is also the layout inside a page.
    """

    def __init__(self, pages: torch.Tensor, isa: str) -> None:
        num_pages, num_heads, page_size, content = pages.shape
        self.pages = pages
        self.isa = isa
        self.num_heads = num_heads
        self.head_dim = content // 2
        self.keys, self.values = pages.view(
            num_pages, num_heads, page_size * 2, self.head_dim
        ).chunk(2, dim=2)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write tokens.

        Args:
            key: ``[tokens, heads, head_dim]``.
            value: as ``key``.
            slots: int64, ``page * page_size + place`` of each token; negative: not written.
        """
        ops.cpu_attn_reshape_and_cache(key, value, self.keys, self.values, slots, self.isa)


@dataclass
class PagedRequests:
    """Requests of a step for the operator; its schedule is made once per number of heads.

    Attributes:
        tables: int32 ``[requests, pages]``.
        lengths: int32 ``[requests]``, keys of each request.
        starts: int32 ``[requests + 1]``, first row of each request.
        window: keys that a query sees, its own included; -1: all.
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    window: int = -1
    schedules: dict[int, torch.Tensor] = field(default_factory=dict)

    def attend(
        self, cache: PagedCache, query: torch.Tensor, output: torch.Tensor, scale: float
    ) -> None:
        """Attend to ``cache``.

        Args:
            cache: of the KV heads that the query heads belong to.
            query: ``[tokens, query heads, head_dim]``; only the last dimension need be dense.
            output: as ``query``, dense; filled in place.
            scale: factor on ``q @ k``.
        """
        schedule = self.schedules.get(cache.num_heads)
        if schedule is None:
            schedule = self.schedules[cache.num_heads] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.lengths),
                num_heads=query.shape[1],
                num_kv_heads=cache.num_heads,
                head_dim=cache.head_dim,
                seq_lens=self.lengths,
                dtype=query.dtype,
                query_start_loc=self.starts,
                causal=True,
                sliding_window_size=self.window,
                isa=cache.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=cache.keys,
            value_cache=cache.values,
            output=output,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=self.window,
            block_table=self.tables,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
