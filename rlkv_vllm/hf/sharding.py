"""Small parameters that a wrapper may have sharded over processes, read and written in full.

Plain parameters (one process, DDP), FSDP2's `DTensor`, and DeepSpeed's, which are empty outside
of their module's turn (ZeRO-3) and low-precision copies of what the optimizer holds in float32
(ZeRO with bf16 or fp16). All but plain ones take a collective operation: call on every process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed import get_rank
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad


def read(parameter: torch.Tensor) -> torch.Tensor:
    """The full parameter on every process, without gradients."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if _has_master(parameter):
        master: torch.Tensor = _deepspeed().utils.safe_get_full_fp32_param(parameter)
        return master.clone()
    if _is_partitioned(parameter):
        with _deepspeed().zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """As `read`, and gradients flow through."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    return _Gather.apply(parameter) if _is_partitioned(parameter) else parameter


def reshard(model: nn.Module) -> None:
    """Drop FSDP2's gathered copies, before `write`: what is written to a copy is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def write(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, the full parameter and the same on every process, into it."""
    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    gathered: AbstractContextManager[Any] = nullcontext()
    if _is_partitioned(parameter):
        gathered = _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0)
    with torch.no_grad():
        with gathered:
            parameter.copy_(values)
        if _has_master(parameter):
            _write_master(parameter, values)


class _Gather(torch.autograd.Function):
    """Gathers in the forward pass; in the backward pass the parameter may be empty again."""

    @staticmethod
    def forward(_: Any, parameter: torch.Tensor) -> torch.Tensor:
        return read(parameter)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _has_master(parameter: torch.Tensor) -> bool:
    """Whether a DeepSpeed optimizer holds the true values: ZeRO-3, or ZeRO-1 and 2."""
    held = hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    return held and parameter.requires_grad


def _write_master(parameter: torch.Tensor, values: torch.Tensor) -> None:
    utils = _deepspeed().utils
    if not _is_partitioned(parameter):
        utils.safe_set_full_fp32_param(parameter, values)
        return
    # DeepSpeed 0.19 cuts a full value wrongly where the last share is not a full one.
    size = utils.safe_get_local_fp32_param(parameter).numel()
    start = size * get_rank(parameter.ds_process_group)
    share = pad(values, (0, start + size))[start : start + size]
    utils.safe_set_local_fp32_param(parameter, share)


def _deepspeed() -> Any:
    # It marked the parameter, so it is installed; not a dependency of ours.
    return import_module("deepspeed")
