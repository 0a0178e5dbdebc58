"""Streaming heads through vLLM's CPU operator against the plain-torch oracle."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation.forecast import CacheGeometry
from rlkv_vllm.engine.cpu.heads import RingHeads, SplitMetadata
from rlkv_vllm.engine.cpu.paged import PagedCache
from rlkv_vllm.kernels.cpu.ring_tiles import PAGE, serves
from rlkv_vllm.kernels.reference import reference_attention

NUM_HEADS, HEAD_DIM = 2, 32
GARBAGE = 50.0  # a block's earlier owner: finite, and large enough to show


def run_step(
    requests: list[tuple[int, int]],
    *,
    sink: int,
    window: int,
    block_size: int,
    group: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of requests of (old, new) tokens, laid out as the ring manager would.

    Blocks that nobody holds are NaN: one that is read shows.

    Returns:
        The answer, the oracle's answer, and the blocks of the cache.
    """
    g = torch.Generator().manual_seed(seed)
    scale = 3.0 / HEAD_DIM**0.5  # sharp: a wrong key shows
    counts = [-(-(old + new) // block_size) for old, new in requests]
    # Two heads with other heads' blocks between them, as layers lie in vLLM's cache.
    memory = torch.full((3, 1 + sum(counts), block_size, 2 * HEAD_DIM), float("nan"), dtype=dtype)
    blocks = memory[::2].transpose(0, 1)
    pages = blocks.as_strided(
        (blocks.shape[0] * block_size // PAGE, NUM_HEADS, PAGE, 2 * HEAD_DIM),
        (PAGE * 2 * HEAD_DIM, blocks.stride(1), 2 * HEAD_DIM, 1),
    )
    cache = PagedCache(pages, "vec16")
    ids = (1 + torch.randperm(sum(counts), generator=g)).tolist()
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    q, k, v, slots, expected = [], [], [], [], []
    for r, (old, new) in enumerate(requests):
        total = old + new
        mine = [ids.pop() for _ in range(counts[r])]
        table[r, : len(mine)] = torch.tensor(mine)
        query = torch.randn(total, NUM_HEADS * group, HEAD_DIM, generator=g).to(dtype)
        key, value = torch.randn(2, total, NUM_HEADS, HEAD_DIM, generator=g).to(dtype)

        def is_held(block: int, tokens: int) -> bool:
            return block * block_size < sink or (block + 1) * block_size > tokens - window + 1

        held = {b for b in range(counts[r]) if is_held(b, old if b * block_size < old else total)}
        blocks[[mine[b] for b in held]] = GARBAGE
        slot = torch.tensor(
            [
                mine[p // block_size] * block_size + p % block_size
                if p // block_size in held
                else p % block_size
                for p in range(total)
            ]
        )
        before = torch.where(slot >= block_size, slot, -1)[:old]
        cache.write(key[:old], value[:old], before)
        q.append(query[old:])
        k.append(key[old:])
        v.append(value[old:])
        slots.append(slot[old:])
        expected.append(
            reference_attention(
                query[old:], key, value, full_heads=(), sink=sink, window=window, scale=scale
            )
        )
    news = [new for _, new in requests]
    step = SplitMetadata(
        num_actual_tokens=sum(news),
        max_query_len=max(news),
        query_start_loc=torch.tensor([0, *news]).cumsum(0).int(),
        seq_lens=torch.tensor([old + new for old, new in requests], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat(slots),
    )
    geometry = CacheGeometry(1, NUM_HEADS, HEAD_DIM, dtype.itemsize, block_size, sink, window)
    output = torch.full_like(torch.cat(q), float("nan"))
    heads = RingHeads(blocks, geometry, scale)
    heads.attend(step, torch.cat(q), torch.cat(k), torch.cat(v), output)
    return output, torch.cat(expected), blocks


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 200))),
        min_size=1,
        max_size=5,
    ),
    sink=st.sampled_from([0, 16, 32, 48]),
    window=st.sampled_from([16, 17, 33, 64, 130]),
    block_size=st.sampled_from([16, 32, 64]),
    group=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_the_oracle_on_a_poisoned_cache(
    requests: list[tuple[int, int]],
    sink: int,
    window: int,
    block_size: int,
    group: int,
    seed: int,
) -> None:
    output, expected, _ = run_step(
        requests, sink=sink, window=window, block_size=block_size, group=group, seed=seed
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_every_length_of_a_prompt_and_its_next_token() -> None:
    for n in range(1, 140):
        for requests in ([(0, n)], [(n, 1)], [(n, 2)]):
            output, expected, _ = run_step(requests, sink=16, window=32, block_size=32)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_tokens_without_a_block_are_not_written() -> None:
    _, _, blocks = run_step([(0, 500)], sink=16, window=33, block_size=16)
    assert blocks[0].isnan().all()
    # The sink's block and those of positions 468 .. 499.
    assert int((~blocks[:, 0, 0, 0].isnan()).sum()) == 1 + (499 // 16 - 468 // 16 + 1)


def test_bfloat16_is_the_oracle_within_rounding() -> None:
    for requests in ([(700, 1), (3, 1), (0, 1)], [(90, 1), (0, 130), (61, 40)]):
        output, expected, _ = run_step(
            requests, sink=16, window=64, block_size=16, dtype=torch.bfloat16
        )
        torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)


def test_a_sink_of_part_of_a_page_is_served_elsewhere() -> None:
    assert serves(0, 16)
    assert serves(16, 64)
    assert not serves(20, 64)
    assert not serves(16, 8)
