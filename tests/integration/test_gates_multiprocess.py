"""Gates on two processes: a step under DDP, FSDP2 and DeepSpeed is the step of one process."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlkv_vllm.bench.server import free_port
from rlkv_vllm.hf import sharding
from rlkv_vllm.hf.gated_attention import GatedAttention, attach_gates

# Three KV heads: no equal share for two processes. The second of layer 1 is driven beyond 1.
START = [[0.5, 0.9, 0.4], [0.3, 0.98, 0.6]]
OTHER = [[0.125, 0.25, 0.375], [0.5, 0.625, 0.75]]
HARD: list[list[int]] = [[0, 2], []]
RATE, REG, PROCESSES = 0.05, 0.05, 2

#: Gives what to call, and how to go backward and step.
Wrapped = tuple[Any, Callable[[torch.Tensor], None], Callable[[], None]]


def model_and_ids(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=2,
        hidden_size=48,
        intermediate_size=32,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype), torch.randint(0, 64, (4, 24))


def loss_of(model: Any, gates: GatedAttention, ids: torch.Tensor) -> torch.Tensor:
    """As in gate training, with cross-entropy in place of the policy loss."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    policy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return policy + REG * gates.mean()


def gradient_of(gate: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(gate, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(gate)
    assert gate.grad is not None
    return sharding.read(gate.grad)


def train(
    wrap: Callable[[Any, torch.optim.Optimizer], Wrapped], dtype: torch.dtype, rank: int, size: int
) -> dict[str, Any]:
    """Attach gates, wrap, step; then what gates are and give."""
    model, ids = model_and_ids(dtype)
    ids = ids.chunk(size)[rank]
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    gates = attach_gates(model, 2, 4)
    gates.set_soft(START)
    optimizer = torch.optim.AdamW(gates.gates, lr=RATE, weight_decay=0.0)
    gates.clamp_after(optimizer)
    wrapped, backward, step = wrap(model, optimizer)

    backward(loss_of(wrapped, gates, ids))
    result: dict[str, Any] = {"gradients": [gradient_of(gate).tolist() for gate in gates.gates]}
    step()
    result["after a step"] = gates.values()
    result["gate"] = f"{type(gates.gates[0]).__name__} {gates.gates[0].dtype}"
    with torch.no_grad():
        gates.set_soft(START)
        result["set"] = gates.values()
        result["soft"] = loss_of(wrapped, gates, ids).item()
        gates.set_hard(HARD)
        result["hard"] = loss_of(wrapped, gates, ids).item()
        gates.set_soft(OTHER)
        sharding.reshard(wrapped)
        result["set again"] = gates.values()
        result["tokens"] = model.generate(ids[:, :9], max_new_tokens=3, pad_token_id=0).shape[1]
    result["frozen"] = all(
        torch.equal(sharding.read(weight).to(dtype), weights[name])
        for name, weight in model.named_parameters()
        if name in weights
    )
    return result


def alone(model: Any, optimizer: torch.optim.Optimizer) -> Wrapped:
    return model, torch.Tensor.backward, optimizer.step


def ddp(model: Any, optimizer: torch.optim.Optimizer) -> Wrapped:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    return wrapped, accelerator.backward, prepared.step


def fsdp2(model: Any, optimizer: torch.optim.Optimizer) -> Wrapped:
    """As accelerate does it, which refuses FSDP on the CPU."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (PROCESSES,))
    # One kind keeps whole parameters after a forward pass, the other does not.
    again = model.dtype == torch.float32
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, reshard_after_forward=again)
    shards = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer.param_groups[0]["params"] = shards
    return model, torch.Tensor.backward, optimizer.step


def zero3(model: Any, optimizer: torch.optim.Optimizer) -> Wrapped:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine, engine.backward, engine.step


def work(
    rank: int, wrap: Callable[..., Wrapped], dtype: torch.dtype, port: int, folder: Path
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    result = train(wrap, dtype, rank, PROCESSES)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def two_processes(wrap: Callable[..., Wrapped], dtype: torch.dtype, folder: Path) -> list[Any]:
    # One server imports all this once and forks: an import takes longer than the test.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "accelerate"])
    multiprocessing.start_processes(
        work, (wrap, dtype, free_port(), folder), nprocs=PROCESSES, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize(
    ("wrap", "dtype", "gate"),
    [
        (ddp, torch.float32, "Parameter torch.float32"),
        (fsdp2, torch.float32, "DTensor torch.float32"),
        (fsdp2, torch.bfloat16, "DTensor torch.float32"),
        (zero3, torch.float32, "Parameter torch.float32"),
        (zero3, torch.bfloat16, "Parameter torch.bfloat16"),  # float32 in the optimizer
    ],
)
def test_two_processes_train_as_one(
    wrap: Callable[..., Wrapped],
    dtype: torch.dtype,
    gate: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wrap is zero3 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = train(alone, dtype, 0, 1)
    two = two_processes(wrap, dtype, tmp_path)
    near = {"rel": 1e-4, "abs": 1e-6} if dtype == torch.float32 else {"rel": 6e-2, "abs": 5e-3}
    assert min(min(map(abs, row)) for row in one["gradients"]) > 1e-3
    assert one["after a step"][1][1] == 1.0
    for rank in two:
        assert rank["gate"] == gate
        assert rank["frozen"]
        for key in ("gradients", "after a step"):
            for got, expected in zip(rank[key], one[key], strict=True):
                assert got == pytest.approx(expected, **near), key
        for got, expected in zip(rank["set"], START, strict=True):
            assert got == pytest.approx(expected, abs=1e-7)
        assert rank["set again"] == OTHER
        assert rank["tokens"] == 12
    for key in ("soft", "hard"):
        mean = sum(rank[key] for rank in two) / PROCESSES
        assert mean == pytest.approx(one[key], rel=near["rel"]), key
