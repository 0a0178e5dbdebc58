"""The flex backend of gated attention against the boolean masks of the sdpa backend.

On the CPU flex_attention computes all scores and applies the mask function; the lists of blocks,
which compiled kernels go by, are compared with the mask function.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_mask, flex_attention

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf import flex
from rlkv_vllm.hf.flex import BLOCK, BlockMasks
from rlkv_vllm.hf.gated_attention import attach_gates, local_mask
from tests.support import oracle
from tests.support.checkpoints import (
    ARCHITECTURES,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VOCAB,
    make_checkpoint,
)
from tests.support.profiles import assert_one_line
from tests.unit.hf.test_gated_attention import FULL_HEADS, load, loss_of, padded, positions

SINK, WINDOW = 4, 16
SOFT = [[0.2 * head + 0.1 * layer for head in range(NUM_KV_HEADS)] for layer in range(NUM_LAYERS)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _small_and_uncompiled() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Else torch traces even the uncompiled function, anew for every shape.
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    yield
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, Path]:
    return {name: make_checkpoint(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def prompts(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


# --- block masks ---------------------------------------------------------------------------


def dense_blocks(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    listed = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), listed)


def check_block_mask(
    real_BS: torch.Tensor, num_queries: int, full_heads: tuple[bool, ...], sink: int, window: int
) -> int:
    """Compare a block mask with `local_mask`; returns how many blocks it has."""
    (num_rows, num_keys), num_heads = real_BS.shape, len(full_heads)
    first = num_keys - num_queries
    mask = BlockMasks(real_BS, num_queries).get(full_heads, sink, window, CPU)

    position = torch.arange(num_keys)
    causal_TS = position[None] <= position[first:, None]
    allowed = (causal_TS & real_BS[:, None])[:, None]
    full = torch.tensor(full_heads)[:, None, None]
    expected = torch.where(full, allowed, local_mask(allowed, sink, window))
    got = create_mask(mask.mask_mod, num_rows, num_heads, num_queries, num_keys, device="cpu")
    assert torch.equal(got, expected)

    partial = dense_blocks(mask.kv_num_blocks, mask.kv_indices)
    whole = dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    rows, columns = partial.shape[-2:]
    short = (0, columns * BLOCK - num_keys, 0, rows * BLOCK - num_queries)
    blocks = torch.nn.functional.pad(expected, short)
    blocks = blocks.view(num_rows, num_heads, rows, BLOCK, columns, BLOCK).transpose(3, 4)
    assert not (blocks.any(-1).any(-1) & ~(partial | whole)).any(), "a seen block is left out"
    assert not (whole & ~blocks.all(-1).all(-1)).any(), "a block is whole that is not"
    assert torch.equal(dense_blocks(mask.q_num_blocks, mask.q_indices), partial.mT)
    return int((partial | whole).sum())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_block_masks_are_the_local_mask(data: st.DataObject) -> None:
    num_keys = data.draw(st.sampled_from([2, 20, 127, 128, 129, 300, 400]))
    num_queries = data.draw(st.integers(2, num_keys))
    real_BS = torch.ones(3, num_keys, dtype=torch.bool)
    for row in range(3):
        pad = data.draw(st.integers(0, num_keys))
        side = data.draw(st.sampled_from(["left", "right", "hole"]))
        start = {"left": 0, "right": num_keys - pad, "hole": (num_keys - pad) // 2}[side]
        real_BS[row, start : start + pad] = False
    full_heads = data.draw(st.sampled_from([(True,) * 4, (False,) * 4, (True, False, False, True)]))
    sink = data.draw(st.sampled_from([0, 1, 4, 130, 500]))
    window = data.draw(st.sampled_from([1, 16, 33, 128, 200, 500]))
    check_block_mask(real_BS, num_queries, full_heads, sink, window)


def test_streaming_heads_touch_blocks_of_sink_and_window_only() -> None:
    length = 32 * BLOCK
    real_BS = torch.ones(1, length, dtype=torch.bool)
    real_BS[0, :100] = False
    full = check_block_mask(real_BS, length, (True,), 4, BLOCK)
    streaming = check_block_mask(real_BS, length, (False,), 4, BLOCK)
    # The sink, and the two blocks that a window of one block reaches into.
    assert (full, streaming) == (32 * 33 // 2, 1 + 2 + 30 * 3)


def test_one_compilation_serves_all_lengths_windows_and_heads() -> None:
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    for length, full, window in (
        (137, True, 16),
        (300, True, 16),
        (200, False, 16),
        (190, False, 7),
    ):
        blocks = BlockMasks(torch.ones(3, length, dtype=torch.bool), length)
        mask = blocks.get((full,) * 14, SINK, window, CPU)
        query, key = torch.randn(3, 14, length, 64), torch.randn(3, 7, length, 64)
        function(query, key, key, block_mask=mask, enable_gqa=True)
    assert graphs == 1


# --- models --------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Any, backend: Any, rows: list[list[int]], side: str, **split: Any) -> Any:
    """Gates as in `SOFT`, then heads as in `FULL_HEADS`; of real tokens only."""
    ids, mask = padded(rows, side)
    out = []
    with attach_gates(model, backend=backend, **split) as gates:
        for switch in (lambda: gates.set_soft(SOFT), lambda: gates.set_hard(FULL_HEADS)):
            switch()
            logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
            out.append(logits[mask.bool()])
    return torch.stack(out)


def assert_backends_agree(
    checkpoint: Path, rows: list[list[int]], side: str, sink: int, window: int
) -> None:
    model = load(checkpoint)
    expected = logits_of(model, "sdpa", rows, side, sink=sink, window=window)
    got = logits_of(model, "flex", rows, side, sink=sink, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("side", "sink", "window"), [("left", 4, 16), ("right", 0, 33)])
def test_flex_equals_sdpa(
    checkpoints: dict[str, Path], architecture: str, side: str, sink: int, window: int
) -> None:
    # Longer than two blocks, just over one block, shorter than the window.
    rows = prompts(2 * BLOCK + 5, BLOCK + 12, 7)
    assert_backends_agree(checkpoints[architecture], rows, side, sink, window)


@pytest.mark.parametrize(("sink", "window"), [(0, 1), (4, 1), (0, 16), (4, 33)])
def test_flex_equals_sdpa_at_any_sink_and_window(
    checkpoints: dict[str, Path], sink: int, window: int
) -> None:
    assert_backends_agree(checkpoints["qwen3"], prompts(BLOCK + 12, 90), "left", sink, window)


@torch.no_grad()
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_cached_generation_after_a_flex_prefill_equals_the_oracle(
    checkpoints: dict[str, Path], architecture: str
) -> None:
    rows = prompts(BLOCK + 12, BLOCK - 1, 20)
    ids, mask = padded(rows, "left")
    model = load(checkpoints[architecture])
    with attach_gates(model, SINK, WINDOW, backend="flex") as gates:
        gates.set_hard(FULL_HEADS)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for i, row in enumerate(rows):
        new = out.sequences[i, ids.shape[1] :].tolist()
        expected = oracle.logprobs(
            checkpoints[architecture], row + new[:-1], FULL_HEADS, SINK, WINDOW
        )
        got = torch.log_softmax(torch.stack([step[i] for step in out.logits]), -1)
        torch.testing.assert_close(got, expected[len(row) - 1 :], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["chunks", "static"])
def test_queries_behind_a_cache_equal_the_oracle(checkpoints: dict[str, Path], cache: str) -> None:
    (row,) = prompts(BLOCK + 40)
    ids = torch.tensor([row])
    model = load(checkpoints["qwen3"])
    with attach_gates(model, SINK, WINDOW, backend="flex") as gates:
        gates.set_hard(FULL_HEADS)
        if cache == "chunks":
            past, parts = None, []
            for part in ids.split([100, 60, 8], 1):
                out = model(part, past_key_values=past, use_cache=True)
                past = out.past_key_values
                parts.append(out.logits[0])
            got = torch.log_softmax(torch.cat(parts), -1)
            new: list[int] = []
        else:
            out = model.generate(
                ids,
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                output_logits=True,
                return_dict_in_generate=True,
            )
            got = torch.log_softmax(torch.cat(out.logits), -1)
            new = out.sequences[0, len(row) : -1].tolist()
    expected = oracle.logprobs(checkpoints["qwen3"], row + new, FULL_HEADS, SINK, WINDOW)
    torch.testing.assert_close(got, expected[-len(got) :], atol=1e-5, rtol=0)


@torch.no_grad()
def test_block_masks_are_made_once_per_prefill_and_not_for_decode_steps(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[bool, ...]] = []
    make = flex._block_mask

    def counted(*args: Any) -> Any:
        made.append(args[2])
        return make(*args)

    monkeypatch.setattr(flex, "_block_mask", counted)
    model = load(checkpoints["qwen3"])
    with attach_gates(model, SINK, WINDOW, backend="flex") as gates:
        gates.set_soft(SOFT)
        model.generate(
            torch.tensor(prompts(30)), max_new_tokens=4, min_new_tokens=4, pad_token_id=0
        )
        assert made == [(True,) * 8, (False,) * 8]
    with attach_gates(model, SINK, WINDOW) as gates:
        model(torch.tensor(prompts(30)))
        assert len(made) == 2, "auto is sdpa on the CPU"


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(checkpoints: dict[str, Path]) -> None:
    rows = prompts(40, 25)
    model = load(checkpoints["qwen3"])
    with attach_gates(model, SINK, WINDOW, backend="flex") as gates:
        gates.set_hard(FULL_HEADS)
        position = torch.cat([torch.arange(len(row)) for row in rows])[None]
        packed = model(torch.tensor([rows[0] + rows[1]]), position_ids=position, use_cache=False)
    expected = [
        oracle.logprobs(checkpoints["qwen3"], row, FULL_HEADS, SINK, WINDOW) for row in rows
    ]
    got = torch.log_softmax(packed.logits[0], -1)
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)


def test_gate_gradients_of_flex_equal_those_of_sdpa(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch refuses gradients on the CPU; what its kernels stand for has them.
    def by_definition(
        query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **_: Any
    ) -> Any:
        out = math_attention(query, key, value, lambda s, *_: s, mask.as_tuple(), scaling, {})[0]
        return out.transpose(1, 2)

    monkeypatch.setattr(flex, "attend", by_definition)
    model = load(checkpoints["qwen3"])
    ids = torch.tensor(prompts(BLOCK + 12))
    gradients = []
    for backend in ("sdpa", "flex"):
        with attach_gates(model, SINK, WINDOW, backend=backend) as gates:
            gates.set_soft(SOFT)
            loss_of(model, ids).backward()
            gradients.append(torch.stack([gate.grad for gate in gates.gates]))
    assert gradients[0].abs().min() > 1e-5
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_what_flex_cannot_do_is_refused(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["qwen3"])
    ids = torch.tensor(prompts(9))
    with pytest.raises(RlkvError) as error:
        attach_gates(model, SINK, WINDOW, backend="flash")
    assert_one_line(error.value, "flash", "auto, sdpa, flex")
    with attach_gates(model, SINK, WINDOW, backend="flex"):
        with pytest.raises(RlkvError) as error:
            loss_of(model, ids)
        assert_one_line(error.value, "gradients", "CPU", "sdpa")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(RlkvError) as error:
            model.train()(ids)
        assert_one_line(error.value, "0.1", "attention_dropout")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("side", ["left", "right"])
def test_compiled_flex_equals_sdpa(checkpoints: dict[str, Path], side: str) -> None:
    model = load(checkpoints["qwen3"]).cuda()
    for rows in (prompts(2 * BLOCK + 5, BLOCK + 12, 7), prompts(90), prompts(300, 200)):
        ids, mask = (x.cuda() for x in padded(rows, side))
        outputs = []
        for backend in ("sdpa", "auto"):
            with attach_gates(model, SINK, WINDOW, backend=backend) as gates:
                gates.set_soft(SOFT)
                logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
                logits[mask.bool()].log_softmax(-1)[:, 7].sum().backward()
                gradient = torch.stack([gate.grad for gate in gates.gates])
                gates.set_hard(FULL_HEADS)
                with torch.no_grad():
                    hard = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
                outputs.append((logits.detach()[mask.bool()], hard[mask.bool()], gradient))
        for expected, got in zip(*outputs, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
