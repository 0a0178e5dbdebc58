"""Small parameters that a wrapper may have sharded over processes, read and written as a whole.

Plain parameters (one process, DDP), FSDP2's `DTensor`, and DeepSpeed's, which are empty outside
of their module's turn (ZeRO-3) and low-precision copies of what the optimizer holds in float32
(ZeRO with bf16 or fp16). All but plain ones take a collective operation: call on every process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def read(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter on every process, without gradients."""
    if isinstance(parameter, DTensor):
        full: torch.Tensor = parameter.detach().full_tensor()
        return full
    if _is_partitioned(parameter) or _has_master(parameter):
        from deepspeed.utils import safe_get_full_fp32_param
        from deepspeed.runtime.zero import GatheredParameters

        if _has_master(parameter):
            master: torch.Tensor = safe_get_full_fp32_param(parameter)
            return master.detach().clone()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """As `read`, and gradients flow through."""
    if isinstance(parameter, DTensor):
        full: torch.Tensor = parameter.full_tensor()
        return full
    if _is_partitioned(parameter):
        gathered: torch.Tensor = _Whole.apply(parameter)
        return gathered
    return parameter


def write(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, the whole parameter and the same on every process, into it."""
    values = values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
        if _is_partitioned(parameter):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values)
        else:
            parameter.copy_(values)
        if _has_master(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, values.float())


class _Whole(torch.autograd.Function):
    """Gathers in the forward pass; in the backward pass the parameter may be empty again."""

    @staticmethod
    def forward(_: Any, parameter: torch.Tensor) -> torch.Tensor:
        return read(parameter)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


def _is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _has_master(parameter: torch.Tensor) -> bool:
    """Whether a DeepSpeed optimizer holds the true values: ZeRO-3, or ZeRO-1 and 2."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
