"""Muon (Jordan et al., 2024) for the matrices inside the decoder, AdamW for embeddings, head, norms and biases.

A matrix steps along the orthogonalised momentum, scaled so that its size is that of an AdamW step (Liu et al., 2025):
one learning rate serves both. Orthogonalising needs the whole matrix, so a sharded one is gathered, one at a time, and
each rank keeps its rows of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.optim.adamw import adamw

from sft_dist.parallel.engine import RunOptimizer, full_tensor, like_sharded

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, five times
NUM_ITERATIONS = 5
EPS = 1e-7


class Muon(RunOptimizer):
    """One momentum for each matrix of `matrices` (ids of parameters), two moments for everything else."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        matrices: set[int],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "lr_scale": 1.0})
        self._matrices = matrices

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            names = ("momentum_buffer",) if id(parameter) in self._matrices else ("exp_avg", "exp_avg_sq")
            state = {name: torch.zeros_like(parameter) for name in names}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for parameter in moved:
                if id(parameter) in self._matrices:
                    self._orthogonal_step(parameter, group)
            self._adamw_step([p for p in moved if id(p) not in self._matrices], group)

    def _orthogonal_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalise(gradient.lerp(momentum, MOMENTUM))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-_adjust_lr(group["lr"], "match_rms_adamw", parameter.shape))

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values around one, by bfloat16 arithmetic. Collective where it is sharded."""
    whole = _zeropower_via_newtonschulz(full_tensor(matrix), COEFFICIENTS, NUM_ITERATIONS, EPS).to(matrix.dtype)
    return like_sharded(whole, matrix)
