"""vLLM's C++ paged attention, called with the heads, tables and layout that a split cache needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs


@dataclass(frozen=True)
class CacheNumber:
    """vLLM's name of the cache's type (``auto``: that of the model), and what a key and a value in
    the cache are to be multiplied by.
    """

    dtype: str = "auto"
    k_scale: float = 1.0
    v_scale: float = 1.0

    def of_cache(self) -> dict[str, Any]:
        """Arguments of the operators."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale, "kv_cache_dtype": self.dtype}


class PagedCache:
    """The caches of some KV heads as the operators take them.

    Args:
        pages: ``[pages, heads, page_size, 2 * head_dim]``; a page of a head is dense.
        isa: vLLM's name of the kernel, which is also the layout inside a page.
        number: how a number is stored in it.
    """

    def __init__(self, pages: Tensor, isa: str, number: CacheNumber = CacheNumber()) -> None:
        num_pages, num_heads, page_size, content = pages.shape
        self.pages, self.isa, self.number = pages, isa, number
        self.num_heads, self.head_dim = num_heads, content // 2
        self.keys, self.values = pages.view(
            num_pages, num_heads, page_size * 2, self.head_dim
        ).chunk(2, dim=2)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write tokens, ``[tokens, heads, head_dim]``.

        ``slots``: int64, ``page * page_size + place`` of each token; negative: not written.
        """
        ops.cpu_attn_reshape_and_cache(
            key, value, self.keys, self.values, slots, self.isa, **self.number.of_cache()
        )


@dataclass
class PagedRequests:
    """Requests of a step for the operator; its schedule is made once per number of heads."""

    tables: Tensor  # int32 [requests, pages]
    lengths: Tensor  # int32 [requests], keys of each request
    starts: Tensor  # int32 [requests + 1], first row of each request
    window: int = -1  # keys that a query sees, its own included; -1: all
    schedules: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, cache: PagedCache, query: Tensor, output: Tensor, scale: float) -> None:
        """Attend to the cache of the KV heads that the query heads belong to.

        ``query``: ``[tokens, query heads, head_dim]``, of which only the last dimension need be
        dense; ``output``: as ``query``, dense; filled in place.
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
                kv_cache_dtype=cache.number.dtype,
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
            **cache.number.of_cache(),
        )
