"""Gated attention over pages equals the mix of the two reference attentions."""

from __future__ import annotations

import pytest
import torch

from rlkv_vllm.kernels.cpu.gated import gated_attention, write_pages
from rlkv_vllm.kernels.reference import reference_attention


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (4, 16), (5, 33), (500, 1)])
def test_equals_the_mix_of_full_and_local_attention(
    dtype: torch.dtype, tolerance: float, sink: int, window: int
) -> None:
    torch.manual_seed(sink + window)
    heads, group, size, block_size, pool = 3, 2, 32, 16, 120
    # Decode and prefill mixed, chunks after a cached prefix, one longer than a chunk of queries.
    lengths, asked = [1, 17, 64, 65, 700, 300, 40], [1, 1, 64, 5, 290, 1, 33]
    order = torch.randperm(pool).int()
    table = torch.full((len(lengths), 44), -1, dtype=torch.int32)
    cache = torch.full((pool, heads, block_size, 2 * size), float("nan"), dtype=dtype)
    keys, values, used = [], [], 0
    for request, length in enumerate(lengths):
        blocks = order[used : (used := used + -(-length // block_size))]
        table[request, : len(blocks)] = blocks
        key, value = torch.randn(2, length, heads, size).to(dtype).unbind()
        position = torch.arange(length)
        write_pages(
            key, value, cache, blocks[position // block_size] * block_size + position % block_size
        )
        keys.append(key), values.append(value)
    query = (2 * torch.randn(sum(asked), heads * group, size)).to(dtype)
    starts = torch.tensor([0, *asked]).cumsum(0).int()
    gates = torch.tensor([0.0, 0.3, 1.0])
    out = torch.full_like(query, float("nan"))
    gated_attention(
        query, cache, table, torch.tensor(lengths).int(), starts, gates, out,
        sink=sink, window=window, scale=size**-0.5,
    )  # fmt: skip
    for request, (key, value) in enumerate(zip(keys, values, strict=True)):
        q = query[starts[request] : starts[request + 1]].float()

        def attend(full: tuple[int, ...], q=q, key=key, value=value) -> torch.Tensor:
            return reference_attention(
                q, key.float(), value.float(), full_heads=full, sink=sink, window=window,
                scale=size**-0.5,
            )  # fmt: skip

        gate = gates.repeat_interleave(group)[:, None]
        expected = gate * attend((0, 1, 2)) + (1 - gate) * attend(())
        found = out[starts[request] : starts[request + 1]].float()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
