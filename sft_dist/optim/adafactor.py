"""Adafactor (Shazeer and Stern, 2018), PyTorch's: the second moment of a matrix as one row and one column.

The step is relative to the size of the weights: `optim.lr` bounds it, 0.01 is the paper's value and what `auto` takes.
PyTorch's update does not run on sharded tensors (its in-place square of a partial norm is refused), and its sums over
rows and columns need the whole matrix anyway: a sharded one is gathered, one at a time, and each rank keeps its rows.
So every world size takes the very same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._adafactor import adafactor

from sft_dist.parallel.engine import RunOptimizer, full_tensor, like_sharded, local_tensor

SETTINGS = {"beta2_decay": -0.8, "eps1": None, "eps2": 1e-3, "d": 1.0}  # PyTorch's defaults, the paper's values


class Adafactor(RunOptimizer):
    """Row and column factors for matrices, the whole second moment for vectors."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "lr_scale": 1.0})

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            state: dict[str, Tensor] = {"step": torch.zeros(())}
            if parameter.ndim > 1:
                state["row_var"] = torch.zeros_like(parameter[..., :1])
                state["col_var"] = _whole(torch.zeros_like(parameter[..., :1, :]))
            else:
                state["variance"] = torch.zeros_like(parameter)
            self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        held = {"weight": parameter} | {key: tensor for key, tensor in state.items() if key != "step"}
        whole = {key: full_tensor(tensor) for key, tensor in held.items()}
        adafactor(
            [whole["weight"]],
            [full_tensor(parameter.grad)],  # type: ignore[arg-type]
            [whole.get("row_var")],
            [whole.get("col_var")],
            [whole.get("variance")],
            [state["step"]],
            foreach=False,
            maximize=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            **SETTINGS,  # type: ignore[arg-type]
        )
        for key, tensor in held.items():
            if whole[key] is not tensor:
                local_tensor(tensor).copy_(local_tensor(like_sharded(whole[key], tensor)))


def _whole(tensor: Tensor) -> Tensor:
    """A column factor sums over the sharded rows, so every rank holds all of it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
