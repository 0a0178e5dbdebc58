"""Muon in float32: momentum, orthogonalised by Newton-Schulz iterations.

`torch.optim.Muon` iterates in bfloat16, matrix by matrix. On a CPU without bfloat16 arithmetic
that took four fifths of a training step; here matrices of one shape are iterated together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

_A, _B, _C = 3.4445, -4.775, 2.0315  # quintic of steepest slope at 0
_ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values near 1 (between about .7 and 1.2).

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Args:
        matrices: [n, rows, columns], rows <= columns, float32.

    Returns:
        [n, rows, columns].
    """
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised and scaled to the update size of AdamW.

    Args:
        weights: 2-D parameters.
        lr: learning rate, comparable to AdamW's.
        momentum: in [0, 1).
        weight_decay: decoupled, relative to `lr`.
    """

    def __init__(
        self,
        weights: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        """Update every weight that has a gradient."""
        assert closure is None, "closures are not supported"
        with torch.no_grad():
            for group in self.param_groups:
                by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
                for weight in group["params"]:
                    if weight.grad is not None:
                        by_shape[tuple(sorted(weight.shape))].append(weight)
                for weights in by_shape.values():
                    self._step_together(weights, group)

    def _step_together(self, weights: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for weight in weights:
            buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            buffer.lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(buffer, group["momentum"])
            updates.append(update.mT if weight.shape[0] > weight.shape[1] else update)
        # 0.2 is the root mean square of a typical AdamW update (Liu et al. 2025, arXiv:2502.16982).
        scale = 0.2 * max(weights[0].shape) ** 0.5
        for weight, update in zip(weights, orthogonalize(torch.stack(updates)), strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(
                update.mT if weight.shape[0] > weight.shape[1] else update,
                alpha=-group["lr"] * scale,
            )
