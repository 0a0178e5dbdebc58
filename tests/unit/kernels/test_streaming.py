"""Streaming attention on the CPU against the plain-torch oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.kernels.cpu.step import StreamingStep
from rlkv_vllm.kernels.cpu.streaming import plan_step, prefill_tile, streaming_attention
from rlkv_vllm.kernels.reference import reference_attention, streaming_mask


class Step:
    """A step of several requests on a poisoned cache, as the ring manager would lay it out."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        *,
        sink: int,
        window: int,
        block_size: int,
        num_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.requests, self.sink, self.window = requests, sink, window
        self.scale = 3.0 / head_dim**0.5  # sharp: a wrong key shows
        total = [old + new for old, new in requests]
        blocks = [-(-n // block_size) for n in total]
        num_blocks = 1 + sum(blocks)
        self.cache = torch.full(
            (num_heads, num_blocks * block_size, 2 * head_dim), float("nan"), dtype=dtype
        )
        order = (1 + torch.randperm(num_blocks - 1, generator=g)).tolist()
        table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
        self.q, self.k, self.v, slots = [], [], [], []
        for r, (old, _new) in enumerate(requests):
            n = total[r]
            q = torch.randn(n, num_heads * group, head_dim, generator=g).to(dtype)
            k = torch.randn(n, num_heads, head_dim, generator=g).to(dtype)
            v = torch.randn(n, num_heads, head_dim, generator=g).to(dtype)
            ids = [order.pop() for _ in range(blocks[r])]
            table[r, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            first_visible = max(0, old - window + 1)
            for p in range(old):  # freed positions keep NaN: the table's entry is stale
                if p < sink or p >= first_visible:
                    self.cache[:, ids[p // block_size] * block_size + p % block_size] = torch.cat(
                        [k[p], v[p]], -1
                    )
            lean_from = -(-sink // block_size)
            lean_to = max(0, n - window + 1) // block_size
            for p in range(old, n):
                block = p // block_size
                null = lean_from <= block < lean_to and block * block_size >= old
                slots.append((0 if null else ids[block]) * block_size + p % block_size)
            self.q.append(q)
            self.k.append(k)
            self.v.append(v)
        starts = torch.tensor([0] + [n for _, n in requests]).cumsum(0).int()
        self.plan = plan_step(
            StreamingStep(
                table,
                torch.tensor(total, dtype=torch.int32),
                starts,
                torch.tensor(slots),
                block_size=block_size,
                sink=sink,
                window=window,
            )
        )
        self.null_slots = self.cache[:, :block_size].clone()
        self.shape = (num_heads, group, head_dim)

    def new_tokens(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([t[old:] for t, (old, _) in zip(tensors, self.requests, strict=True)])

    def run(self) -> torch.Tensor:
        q, k, v = (self.new_tokens(t) for t in (self.q, self.k, self.v))
        out = torch.full_like(q, float("nan"))
        streaming_attention(
            self.plan,
            self.cache,
            q.view(len(q), *self.shape),
            k,
            v,
            out.view(len(q), *self.shape),
            self.scale,
        )
        return out

    def expected(self) -> torch.Tensor:
        return torch.cat(
            [
                reference_attention(
                    q[old:],
                    k,
                    v,
                    full_heads=(),
                    sink=self.sink,
                    window=self.window,
                    scale=self.scale,
                )
                for q, k, v, (old, _) in zip(self.q, self.k, self.v, self.requests, strict=True)
            ]
        )


def test_mask_is_the_published_rule() -> None:
    mask = streaming_mask(torch.tensor([9]), torch.arange(12), sink=2, window=3)
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 200))),
        min_size=1,
        max_size=5,
    ),
    sink=st.sampled_from([0, 1, 4, 16, 20]),
    window=st.sampled_from([1, 2, 16, 33, 64]),
    block_size=st.sampled_from([16, 32]),
    num_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_equals_the_oracle_on_a_poisoned_cache(
    requests: list[tuple[int, int]],
    sink: int,
    window: int,
    block_size: int,
    num_heads: int,
    group: int,
    seed: int,
) -> None:
    step = Step(
        requests,
        sink=sink,
        window=window,
        block_size=block_size,
        num_heads=num_heads,
        group=group,
        head_dim=16,
        seed=seed,
    )
    torch.testing.assert_close(step.run(), step.expected(), atol=1e-5, rtol=1e-5)


def test_null_block_is_never_written() -> None:
    step = Step([(0, 500)], sink=4, window=33, block_size=16, num_heads=2, group=2, head_dim=16)
    step.run()
    assert step.cache[:, :16].isnan().all()


def test_only_the_window_and_the_sinks_are_written() -> None:
    step = Step([(0, 500)], sink=4, window=33, block_size=16, num_heads=1, group=1, head_dim=16)
    step.run()
    written = (~step.cache[0].isnan().any(-1)).sum().item()
    # One sink block and the blocks of positions 468 .. 499.
    assert written == 16 + (500 - 468 // 16 * 16)


def test_prefill_work_grows_with_the_window_not_the_prompt() -> None:
    keys = []
    for n in (1000, 4000):
        step = Step([(0, n)], sink=16, window=64, block_size=16, num_heads=1, group=1, head_dim=16)
        assert step.plan.prefill is not None
        keys.append(step.plan.prefill.keys_PS.shape[1])
    assert keys[0] == keys[1] == 16 + 63 + prefill_tile(64)


@pytest.mark.parametrize("requests", [[(700, 1), (3, 1), (0, 1)], [(90, 1), (0, 130), (61, 40)]])
def test_bfloat16_inputs_are_computed_in_float32(requests: list[tuple[int, int]]) -> None:
    step = Step(
        requests,
        sink=16,
        window=64,
        block_size=16,
        num_heads=2,
        group=4,
        head_dim=32,
        dtype=torch.bfloat16,
    )
    torch.testing.assert_close(step.run(), step.expected(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cache_of_8_bits_holds_rounded_keys(dtype: torch.dtype) -> None:
    """Also of the step's own tokens; what is too large for the type becomes its largest number."""
    head_dim, k_scale, v_scale = 32, 0.5, 2.0
    step = Step(
        [(0, 70), (200, 1), (90, 40), (17, 5)],
        sink=4,
        window=33,
        block_size=16,
        num_heads=2,
        group=2,
        head_dim=head_dim,
    )
    step.v[0][60] = 1e6
    scales = torch.tensor([k_scale] * head_dim + [v_scale] * head_dim)
    cache = (step.cache / scales).to(dtype)
    q, k, v = (step.new_tokens(t) for t in (step.q, step.k, step.v))
    out = torch.full_like(q, float("nan"))
    streaming_attention(
        step.plan,
        cache,
        q.view(len(q), *step.shape),
        k,
        v,
        out.view(len(q), *step.shape),
        step.scale,
        k_scale,
        v_scale,
    )
    most = torch.finfo(dtype).max
    for tensors, scale in ((step.k, k_scale), (step.v, v_scale)):
        tensors[:] = [(t / scale).clamp(-most, most).to(dtype).float() * scale for t in tensors]
    torch.testing.assert_close(out, step.expected(), rtol=1e-5, atol=1e-5)
