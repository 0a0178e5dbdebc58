"""Gated attention on four random architectures against an explicit per-head mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import attach_gates, local_mask
from rlkv_vllm.kernels.reference import streaming_mask
from tests.support import oracle
from tests.support.checkpoints import (
    ARCHITECTURES,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VOCAB,
    make_checkpoint,
)
from tests.support.profiles import assert_one_line

SINK, WINDOW = 2, 5
# A mixed layer, one without full heads, one with all, another mixed one.
FULL_HEADS: list[list[int]] = [[0, 3], [], [0, 1, 2, 3], [2]]
NONE_FULL: list[list[int]] = [[] for _ in range(NUM_LAYERS)]
LENGTHS = (23, 40, 7)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def checkpoint(request: Any, tmp_path_factory: Any) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: Any) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def sequences() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in LENGTHS]


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad = [0] * (longest - len(row))
        on = [1] * len(row)
        ids.append(pad + row if side == "left" else row + pad)
        mask.append(pad + on if side == "left" else on + pad)
    return torch.tensor(ids), torch.tensor(mask)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])


def test_local_mask_is_the_served_one() -> None:
    position = torch.arange(30)
    causal = (position[None] <= position[:, None])[None, None]
    for sink, window in ((0, 1), (0, 7), (4, 16), (16, 33)):
        expected = streaming_mask(position, position, sink, window)
        assert torch.equal(local_mask(causal, sink, window)[0, 0], expected)


@torch.no_grad()
def test_gates_of_one_change_nothing(checkpoint: Path) -> None:
    model = load(checkpoint)
    ids, mask = padded(sequences(), "left")
    plain = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    with attach_gates(model, SINK, WINDOW) as gates:
        gated = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        gates.set_soft([[0.0] * NUM_KV_HEADS] * NUM_LAYERS)
        streaming = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    here = mask.bool()
    torch.testing.assert_close(gated[here], plain[here], atol=1e-5, rtol=0)
    assert (streaming[here] - plain[here]).abs().max() > 0.1
    again = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert torch.equal(again[here], plain[here])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_hard_heads_equal_the_oracle(checkpoint: Path, side: str) -> None:
    rows = sequences()
    ids, mask = padded(rows, side)
    model = load(checkpoint)
    with attach_gates(model, SINK, WINDOW) as gates:
        gates.set_hard(FULL_HEADS)
        logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        soft = [[float(h in heads) for h in range(NUM_KV_HEADS)] for heads in FULL_HEADS]
        gates.set_soft(soft)
        by_gates = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for i, row in enumerate(rows):
        expected = oracle.logprobs(checkpoint, row, FULL_HEADS, SINK, WINDOW)
        for given in (logits, by_gates):
            got = torch.log_softmax(given[i][mask[i].bool()], -1)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(logits[mask.bool()], by_gates[mask.bool()])


@torch.no_grad()
def test_full_heads_of_each_sequence_equal_one_allocation_at_a_time(qwen3: Path) -> None:
    rows = sequences()
    ids, mask = padded(rows, "left")
    model = load(qwen3)
    everything = [list(range(NUM_KV_HEADS))] * NUM_LAYERS
    allocations = [FULL_HEADS, NONE_FULL, everything]
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    with attach_gates(model, SINK, WINDOW, "sdpa") as gates:
        gates.set_hard_each(allocations)
        together = model(ids, **given).logits
        keep = torch.tensor([2, 0])
        gates.select_sequences(keep)
        fewer = model(ids[keep], **{name: value[keep] for name, value in given.items()}).logits
        for i, full_heads in enumerate(allocations):
            gates.set_hard(full_heads)
            alone = model(ids, **given).logits[i]
            here = mask[i].bool()
            torch.testing.assert_close(together[i][here], alone[here], atol=1e-6, rtol=0)
            for place in (keep == i).nonzero().flatten().tolist():
                torch.testing.assert_close(fewer[place][here], alone[here], atol=1e-6, rtol=0)
        with pytest.raises(RlkvError, match="full head 4 of layer 3 does not exist"):
            gates.set_hard_each([FULL_HEADS, [*NONE_FULL[:3], [4]]])


@torch.no_grad()
def test_cached_left_padded_generation_equals_the_oracle(checkpoint: Path) -> None:
    rows = sequences()
    ids, mask = padded(rows, "left")
    model = load(checkpoint)
    with attach_gates(model, SINK, WINDOW) as gates:
        gates.set_hard(FULL_HEADS)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for i, row in enumerate(rows):
        new = out.sequences[i, ids.shape[1] :].tolist()
        expected = oracle.logprobs(checkpoint, row + new[:-1], FULL_HEADS, SINK, WINDOW)
        got = torch.log_softmax(torch.stack([step[i] for step in out.logits]), -1)
        torch.testing.assert_close(got, expected[len(row) - 1 :], atol=1e-5, rtol=0)


def test_gate_gradients_equal_finite_differences(checkpoint: Path) -> None:
    # float64, but RMSNorm rounds to float32 whatever the model: the step must be large.
    model = load(checkpoint).double()
    step = 5e-3
    ids = torch.tensor([sequences()[1]])
    values = [
        [0.2 + 0.05 * (layer + 3 * head) for head in range(NUM_KV_HEADS)]
        for layer in range(NUM_LAYERS)
    ]
    with attach_gates(model, SINK, WINDOW) as gates:
        for gate in gates.gates:
            gate.data = gate.data.double()
        gates.set_soft(values)
        loss_of(model, ids).backward()
        for layer, head in ((0, 0), (1, 3), (3, 2)):
            ends = []
            for change in (step, -step):
                with torch.no_grad():
                    gates.gates[layer][head] += change
                    ends.append(loss_of(model, ids).item())
                    gates.gates[layer][head] -= change
            gradient = gates.gates[layer].grad
            assert gradient is not None
            expected = (ends[0] - ends[1]) / (2 * step)
            assert gradient[head].item() == pytest.approx(expected, rel=5e-3)


def test_weights_are_frozen_and_given_back(qwen3: Path) -> None:
    model = load(qwen3)
    names = set(dict(model.named_parameters()))
    frozen_before = model.model.norm.weight
    frozen_before.requires_grad_(False)
    with attach_gates(model, SINK, WINDOW) as gates:
        assert [gate.dtype for gate in gates.gates] == [torch.float32] * NUM_LAYERS
    assert gates.gates == []
    assert set(dict(model.named_parameters())) == names
    assert model.config._attn_implementation == "sdpa"
    assert not frozen_before.requires_grad
    assert all(w.requires_grad for w in model.parameters() if w is not frozen_before)


def test_only_gates_train(checkpoint: Path) -> None:
    model = load(checkpoint).train()
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    with attach_gates(model, SINK, WINDOW) as gates:
        gates.set_soft([[0.5] * NUM_KV_HEADS] * NUM_LAYERS)
        # All parameters, with decay: what is frozen must be so without the optimizer's help.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            loss_of(model, torch.tensor([sequences()[0]])).backward()
            for name, weight in model.named_parameters():
                assert (weight.grad is not None) == name.endswith("self_attn.rlkv_gate"), name
            optimizer.step()
            optimizer.zero_grad()
        assert all(gate != 0.5 for row in gates.values() for gate in row)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_mean_pulls_all_gates_alike_and_steps_end_in_range(qwen3: Path) -> None:
    with attach_gates(load(qwen3), SINK, WINDOW) as gates:
        gates.set_soft([[0.0, 0.25, 0.75, 1.0]] * NUM_LAYERS)
        assert gates.mean().item() == 0.5
        optimizer = torch.optim.SGD(gates.gates, lr=0.5 * NUM_LAYERS * NUM_KV_HEADS)
        gates.clamp_after(optimizer)
        gates.mean().backward()
        optimizer.step()
        assert gates.values() == [[0.0, 0.0, 0.25, 0.5]] * NUM_LAYERS
        optimizer.zero_grad()
        (-4 * gates.mean()).backward()
        optimizer.step()
        assert gates.values() == [[0.0, 0.0, 1.0, 1.0]] * NUM_LAYERS


def test_gates_of_a_bfloat16_model_stay_float32(qwen3: Path) -> None:
    values = [[0.9 + 0.003 * head + 0.01 * layer for head in range(4)] for layer in range(4)]
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        # The weights of both are those of bfloat16.
        model = load(qwen3).bfloat16().to(dtype)
        with attach_gates(model, SINK, WINDOW) as gates:
            gates.set_soft(values)
            # Half a step of bfloat16 at these values: would be lost in the rounding.
            assert gates.values()[0][1] == pytest.approx(0.903, abs=1e-7)
            logits = model(torch.tensor([sequences()[1]])).logits
            assert logits.dtype == dtype
            torch.nn.functional.cross_entropy(
                logits[0, :-1].float(), torch.tensor(sequences()[1][1:])
            ).backward()
            assert all(gate.grad.dtype == torch.float32 for gate in gates.gates)
            gradients.append(torch.stack([gate.grad for gate in gates.gates]))
            torch.optim.SGD(gates.gates, lr=1e-3).step()
            for gate, row, gradient in zip(gates.gates, values, gradients[-1], strict=True):
                expected = torch.tensor(row) - 1e-3 * gradient
                torch.testing.assert_close(gate.detach(), expected, atol=1e-7, rtol=0)
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 0.1
    assert not torch.equal(gradients[0], gradients[0].bfloat16().float()), "rounded to bfloat16"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(checkpoint: Path, use_reentrant: bool) -> None:
    ids, mask = padded(sequences(), "left")
    gradients = []
    for checkpointing in (False, True):
        model = load(checkpoint).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with attach_gates(model, SINK, WINDOW) as gates:
            gates.set_soft([[0.5] * NUM_KV_HEADS] * NUM_LAYERS)
            logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
            logits[mask.bool()].log_softmax(-1)[:, 7].mean().backward()
            gradients.append(torch.stack([gate.grad for gate in gates.gates]))
    assert gradients[0].shape == (NUM_LAYERS, NUM_KV_HEADS)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_local_mask_is_made_once_per_forward(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkv_vllm.hf import gated_attention

    calls = 0

    def counted(allowed: torch.Tensor, sink: int, window: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return local_mask(allowed, sink, window)

    monkeypatch.setattr(gated_attention, "local_mask", counted)
    model = load(qwen3)
    with torch.no_grad(), attach_gates(model, SINK, WINDOW) as gates:
        gates.set_hard(NONE_FULL)
        for _ in range(3):
            model(torch.tensor([sequences()[0]]))
    assert calls == 3


def test_two_models_have_their_own_gates(qwen3: Path) -> None:
    one, two = load(qwen3), load(qwen3)
    ids = torch.tensor([sequences()[1]])
    with torch.no_grad(), attach_gates(one, SINK, WINDOW), attach_gates(two, 0, 1) as gates:
        gates.set_hard(NONE_FULL)
        full, streaming = one(ids).logits, two(ids).logits
    expected = oracle.logprobs(qwen3, ids[0].tolist(), NONE_FULL, 0, 1)
    torch.testing.assert_close(torch.log_softmax(streaming[0], -1), expected, atol=1e-5, rtol=0)
    assert (full - streaming).abs().max() > 0.1


def test_sliding_window_models_are_refused() -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config_cls, model_cls = ARCHITECTURES["mistral"]
    mistral = model_cls(config_cls(**small, sliding_window=8))
    gemma = Gemma2ForCausalLM(Gemma2Config(**small))
    for model in (mistral, gemma):
        with pytest.raises(RlkvError) as error:
            attach_gates(model, SINK, WINDOW)
        assert_one_line(error.value, type(model).__name__, "sliding_attention")


def test_wrong_use_is_refused(qwen3: Path) -> None:
    model = load(qwen3)
    with pytest.raises(RlkvError, match=r"sink 0, window 0: .* window >= 1"):
        attach_gates(model, 0, 0)
    with attach_gates(model, SINK, WINDOW) as gates:
        with pytest.raises(RlkvError, match="gates already"):
            attach_gates(model, SINK, WINDOW)
        with pytest.raises(RlkvError, match=r"given for 1 layers: the model has 4"):
            gates.set_hard([[0]])
        with pytest.raises(RlkvError, match=r"full head 4 of layer 3 does not exist"):
            gates.set_hard([*NONE_FULL[:3], [4]])
        with pytest.raises(RlkvError, match="4 layers of 4 KV heads"):
            gates.set_soft([[1.0]] * NUM_LAYERS)
        with pytest.raises(RlkvError, match=r"boolean attention mask, got one of torch.float32"):
            model(torch.tensor([[5, 6]]), attention_mask=torch.zeros(1, 1, 2, 2))
