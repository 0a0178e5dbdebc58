"""Steps of full and streaming heads on a poisoned cache, for tests of the GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from triton.runtime import interpreter

from rlkv_vllm.kernels.reference import reference_attention
from rlkv_vllm.kernels.triton.decode import INTERPRETER
from rlkv_vllm.kernels.triton.split_attention import (
    LayerCache,
    Workspace,
    split_attention,
    write_cache,
)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let Triton's interpreter multiply bfloat16: it keeps them as uint16 and multiplies those.

    Products in float32 of bfloat16 values are what tensor cores compute. On a GPU nothing changes.
    """
    builder = interpreter.interpreter_builder
    dot = builder.create_dot

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = builder.cast_impl(a, tl.float32), builder.cast_impl(b, tl.float32)
        return dot(a, b, *rest)

    with patch.object(builder, "create_dot", create_dot):
        yield


class SplitStep:
    """One scheduler step of one layer, laid out as the engine's block managers would.

    Whatever a correct kernel must not read is NaN: freed positions, blocks nobody owns, the null
    block, the output before it is written.

    Args:
        requests: (cached tokens, new tokens) of each request; (0, 0) is padding of a CUDA graph.
        full: per KV head, whether it is a full head.
        shared: the first requests share the blocks of as many cached tokens (a prefix hit).
        gates: in gated mode, where all heads are full; closed ones read what streaming ones do.
    """

    def __init__(
        self,
        requests: Sequence[tuple[int, int]],
        full: Sequence[bool],
        *,
        sink: int,
        window: int,
        block_size: int = 16,
        group: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        shared: int = 0,
        target_programs: int = 8,
        seed: int = 0,
        device: str = "cpu",
        gates: Sequence[float] | None = None,
    ) -> None:
        assert gates is None or all(full)
        g = torch.Generator().manual_seed(seed)
        self.requests, self.full = list(requests), list(full)
        self.sink, self.window, self.block_size = sink, window, block_size
        self.head_dim, self.dtype = head_dim, dtype
        self.scale = 3.0 / head_dim**0.5  # sharp: a wrong key shows
        num_heads = len(full)
        shared -= shared % block_size
        total = [old + new for old, new in requests]
        blocks = [-(-n // block_size) for n in total]
        num_blocks = 2 + 2 * sum(blocks)

        def randn(n: int, heads: int) -> torch.Tensor:
            return torch.randn(n, heads, head_dim, generator=g).to(dtype)

        prefix_k, prefix_v = randn(shared, num_heads), randn(shared, num_heads)
        # Caches of the heads lie apart and out of order, as in vLLM's buffers.
        buffer = torch.full(
            (num_heads + 1, num_blocks, block_size, 2 * head_dim), float("nan"), dtype=dtype
        )
        places = torch.randperm(num_heads + 1, generator=g).tolist()
        self.caches = [buffer[places[h]] for h in range(num_heads)]
        free = (1 + torch.randperm(num_blocks - 1, generator=g)).tolist()
        width = max([*blocks, 1]) + 1
        # Entries behind a request's blocks are stale ids of others.
        self.full_table = torch.randint(1, num_blocks, (len(requests), width), generator=g).int()
        self.ring_table = torch.randint(1, num_blocks, (len(requests), width), generator=g).int()
        self.q, self.k, self.v = [], [], []
        full_slots, ring_slots = [], []
        prefix_blocks = shared // block_size
        first_ids: dict[bool, list[int]] = {}
        for r, (old, new) in enumerate(requests):
            n = total[r]
            k, v = randn(n, num_heads), randn(n, num_heads)
            hit = shared if old >= shared else 0
            k[:hit], v[:hit] = prefix_k[:hit], prefix_v[:hit]
            self.q.append(randn(n, num_heads * group))
            self.k.append(k)
            self.v.append(v)
            for kind, table in ((True, self.full_table), (False, self.ring_table)):
                ids = [free.pop() for _ in range(blocks[r])]
                if hit:
                    mine = first_ids.setdefault(kind, ids[:prefix_blocks])
                    ids[:prefix_blocks] = mine
                table[r, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
                first_visible = max(0, old - window + 1)
                for p in range(old):
                    # A ring has given back what left the window: its entries are stale.
                    is_visible = p < sink or p >= first_visible
                    at = ids[p // block_size], p % block_size
                    for h in range(num_heads):
                        is_read = is_visible or (kind and (gates is None or gates[h] > 0))
                        if full[h] == kind and is_read:
                            self.caches[h][at] = torch.cat([k[p, h], v[p, h]])
                # Lean prefill: what is out of the window when the chunk ends gets no block.
                lean_from = -(-sink // block_size)
                lean_to = max(0, n - window + 1) // block_size
                for p in range(old, old + new):
                    block = p // block_size
                    lean = not kind and lean_from <= block < lean_to and block * block_size >= old
                    slot = (0 if lean else ids[block]) * block_size + p % block_size
                    (full_slots if kind else ring_slots).append(slot)
        # Rows behind the last request are padding, as in a CUDA graph.
        self.padding = 3
        self.full_slots = torch.tensor(full_slots + [-1] * self.padding)
        self.ring_slots = torch.tensor(ring_slots + [-1] * self.padding)
        lengths = [new for _, new in requests]
        self.query_start_loc = torch.tensor([0, *lengths]).cumsum(0).int()
        self.seq_lens = torch.tensor(total, dtype=torch.int32)
        self.max_query_len = max(lengths)
        self.device = device
        for name in (
            "full_table",
            "ring_table",
            "full_slots",
            "ring_slots",
            "query_start_loc",
            "seq_lens",
        ):
            setattr(self, name, getattr(self, name).to(device))
        buffer = buffer.to(device)
        self.caches = [buffer[places[h]] for h in range(num_heads)]
        self.cache = LayerCache.of(self.caches, [gates is not None or not kind for kind in full])
        self.gates = None if gates is None else torch.tensor(gates).to(device)
        if gates is not None:
            self.ring_table, self.ring_slots = self.full_table, self.full_slots
        self.workspace = Workspace.of(
            max_requests=len(requests),
            num_q_heads=num_heads * group,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            device=device,
            gated=gates is not None,
            target_programs=target_programs if device == "cpu" else None,
            capability=INTERPRETER,
        )
        self.workspace.output.fill_(float("nan"))
        self.workspace.lse.fill_(float("nan"))

    def new_rows(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The rows of this step, ``[N + padding, heads, D]``."""
        rows = [t[old : old + new] for t, (old, new) in zip(tensors, self.requests, strict=True)]
        rows.append(torch.full((self.padding, *rows[0].shape[1:]), float("nan"), dtype=self.dtype))
        return torch.cat(rows)

    def _fused(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q, K and V as views on one projection's output: not contiguous."""
        q, k, v = (self.new_rows(t) for t in (self.q, self.k, self.v))
        qkv = torch.cat([t.flatten(1) for t in (q, k, v)], dim=1).to(self.device)
        parts = qkv.split([t[0].numel() for t in (q, k, v)], dim=1)
        q, k, v = (part.view(t.shape) for part, t in zip(parts, (q, k, v), strict=True))
        return q, k, v

    def run(self) -> torch.Tensor:
        """Output of the kernels, ``[N, Q, D]`` without padding; padding must stay untouched."""
        q, k, v = self._fused()
        out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
        with bfloat16_products():
            write_cache(k, v, self.cache, self.full_slots, self.ring_slots)
            split_attention(
                q,
                k,
                v,
                out,
                self.cache,
                full_table_RB=self.full_table,
                ring_table_RB=self.ring_table,
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                max_query_len=self.max_query_len,
                workspace=self.workspace,
                sink=self.sink,
                window=self.window,
                scale=self.scale,
                gates_H=self.gates,
            )
        assert out[-self.padding :].isnan().all(), "rows of padding were written"
        return out[: -self.padding].cpu()

    def expected(self) -> torch.Tensor:
        """The oracle's output in float32."""
        full = self._attention([h for h, kind in enumerate(self.full) if kind])
        if self.gates is None:
            return full
        group = full.shape[1] // len(self.full)
        gates = self.gates.cpu().repeat_interleave(group)[:, None]
        return gates * full + (1 - gates) * self._attention([])

    def _attention(self, full_heads: Sequence[int]) -> torch.Tensor:
        return torch.cat(
            [
                reference_attention(
                    q[old:].float(),
                    k.float(),
                    v.float(),
                    full_heads=full_heads,
                    sink=self.sink,
                    window=self.window,
                    scale=self.scale,
                )
                for q, k, v, (old, new) in zip(self.q, self.k, self.v, self.requests, strict=True)
                if new
            ]
        )
