"""AdamW over bfloat16 weights and moments, rounded up or down by chance so that nothing is lost on average.

Rounding to the nearest of eight bits swallows every update below 1/512 of a weight; rounding up with the probability
of the distance keeps them in expectation (Zamirai et al., 2021). The chance is a hash of (seed, step, tensor, element),
so there is no generator to save: a resume repeats it, and an element meets the same draw at every world size.

Six bytes a parameter where fp32 masters take twelve. The moments are rounded in the same way: with beta2 = 0.999 a
second moment rounded to the nearest would stop moving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sft_dist.optim.adamw8bit import adamw_update
from sft_dist.parallel.engine import RunOptimizer, local_tensor
from sft_dist.parallel.runtime import seed_for


class StochasticAdamW(RunOptimizer):
    """The update is computed in fp32, one parameter at a time; `names` says which parameter is which to the hash."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        names: Mapping[str, nn.Parameter],
        seed: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "lr_scale": 1.0})
        self._names = {id(parameter): name for name, parameter in names.items()}
        self._seed = seed

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros(()), **moments}

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
        step = int(state["step"].item())
        held = [local_tensor(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        exact = [tensor.float() for tensor in held]
        adamw_update(exact[0], local_tensor(parameter.grad).float(), exact[1], exact[2], step, group)  # type: ignore[arg-type]
        offset, name = first_element(parameter), self._names[id(parameter)]
        for which, (tensor, value) in enumerate(zip(held, exact, strict=True)):
            tensor.copy_(round_stochastically(value, seed_for(self._seed, step, name, which), offset))


def round_stochastically(values: Tensor, seed: int, offset: int = 0) -> Tensor:
    """fp32 -> bfloat16, up with the probability of the distance to the lower neighbour, so the mean is the value.

    A pure function of (values, seed); `offset` is the place of the first element in the whole tensor.
    """
    noise = hashed_bits(values.numel(), seed, offset, values.device).view(values.shape) & 0xFFFF
    bits = values.contiguous().view(torch.int32) + noise  # carries into the upper half by that chance
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def hashed_bits(number: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """int32[number]: well mixed bits of (seed, offset + i), by multiplications and shifts alone.

    The mixing is lowbias32 of Wellons' search for integer hashes, once over the index and once more over the seed.
    """
    index = torch.arange(offset, offset + number, device=device, dtype=torch.int64)
    low, high = (_signed(part) for part in (seed & 0xFFFFFFFF, seed >> 32))
    return _mixed(_mixed(index.to(torch.int32) ^ low) + (index >> 32).to(torch.int32) + high)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return bits ^ (bits >> 16 & 0xFFFF)


def _signed(number: int) -> int:
    """A 32-bit pattern as the int32 that has it."""
    return (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)


def first_element(tensor: Tensor) -> int:
    """Where this rank's piece begins in the whole tensor, counted in elements; rows are what is sharded."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offsets[1:])
    return offsets[0] * math.prod(tensor.shape[1:])
