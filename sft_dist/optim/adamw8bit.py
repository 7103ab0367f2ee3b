"""AdamW with moments in 8 bits (Dettmers et al., 2022): each block of 256 numbers in a row shares one fp32 scale, each
number is the nearest of 256 values that are dense around zero.

Blocks never cross the rows of a matrix, and engines shard by rows: whatever the number of ranks, the same blocks are
rounded in the same way, and codes and scales are plain tensors that any number of ranks reads back. (torchao lays
blocks over each rank's flat piece, bitsandbytes knows no DTensor.) Vectors and small matrices keep fp32 moments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft_dist.parallel.engine import RunOptimizer, local_tensor

BLOCK = 256
SMALLEST = 4096  # elements; below it the codes would save nothing worth having
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class AdamW8bit(RunOptimizer):
    """The update of AdamW, computed in fp32 one parameter at a time."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "lr_scale": 1.0})

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            state = {"step": torch.zeros(())}
            for name, signed in MOMENTS.items():
                if parameter.ndim > 1 and parameter.numel() >= SMALLEST:
                    zero = int(torch.searchsorted(_edges(signed, torch.device("cpu")), 0.0))
                    state[f"{name}_codes"] = torch.full_like(parameter, zero, dtype=torch.uint8)
                    state[f"{name}_scales"] = _scales_like(parameter)
                else:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
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
        state["step"] += 1
        first, second = (_read(state, name) for name in MOMENTS)
        weight = local_tensor(parameter)
        updated = weight.float()
        adamw_update(updated, local_tensor(parameter.grad).float(), first, second, state["step"].item(), group)  # type: ignore[arg-type]
        weight.copy_(updated)
        _write(state, "exp_avg", first)
        _write(state, "exp_avg_sq", second)


def adamw_update(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: float, group: dict[str, Any]
) -> None:
    """AdamW on fp32 tensors in place; `first` and `second` are the moments, `step` counts from one."""
    beta1, beta2 = group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 [R, ...] -> codes uint8 [R, ...] and scales fp32 [R, blocks of a row]."""
    blocks = _blocked(values)
    scales = blocks.abs().amax(dim=-1)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(relative, _edges(signed, values.device), out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, : values[0].numel()].reshape(values.shape), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The fp32 values that `encode` rounded to."""
    blocks = _levels(signed, codes.device)[_blocked(codes).int()] * scales[..., None]
    return blocks.flatten(1)[:, : codes[0].numel()].reshape(codes.shape)


def dynamic_levels(signed: bool) -> Tensor:
    """256 sorted values in [-1, 1] or [0, 1]: seven decades, twice as many values in each as in the one below."""
    found = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        middles = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32)


@functools.cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    return dynamic_levels(signed).to(device)


@functools.cache
def _edges(signed: bool, device: torch.device) -> Tensor:
    """Where rounding to the nearest level changes over."""
    levels = dynamic_levels(signed)
    return ((levels[:-1] + levels[1:]) / 2).to(device)


def _blocked(values: Tensor) -> Tensor:
    """[R, ...] -> [R, blocks, BLOCK], the last block of a row filled with zeros."""
    rows = values.flatten(1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _scales_like(parameter: Tensor) -> Tensor:
    num_blocks = -(-parameter[0].numel() // BLOCK)
    local = torch.zeros(len(local_tensor(parameter)), num_blocks, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((len(parameter), num_blocks))
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(num_blocks, 1)
    )


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    """The moment `name` in fp32: its own tensor, or a decoded copy."""
    if name in state:
        return local_tensor(state[name])
    return decode(local_tensor(state[f"{name}_codes"]), local_tensor(state[f"{name}_scales"]), MOMENTS[name])


def _write(state: dict[str, Tensor], name: str, values: Tensor) -> None:
    if name in state:
        return  # was moved in place
    codes, scales = encode(values, MOMENTS[name])
    local_tensor(state[f"{name}_codes"]).copy_(codes)
    local_tensor(state[f"{name}_scales"]).copy_(scales)
