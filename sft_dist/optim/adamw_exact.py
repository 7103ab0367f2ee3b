"""AdamW whose bits do not depend on how a tensor is cut into shards (`run.deterministic: elastic`).

PyTorch's fused kernel works on vectors of eight or sixteen elements and on those left over one by one, where the
compiler fuses a product and a sum into one rounding: an element in the tail of a short shard can differ in the last bit
(seen with torch 2.13 in a shard of 12 elements that was 48 as a whole). Here every operation is a tensor operation that
rounds once, in vectors as in tails.
"""

from __future__ import annotations

from typing import Any

import torch

from sft_dist.optim.adamw import AdamW
from sft_dist.parallel.engine import local_part


class ExactAdamW(AdamW):
    """The update of `AdamW`, operation by operation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                number = state["step"].item()
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                weight, gradient, first, second = (local_part(tensor) for tensor in tensors)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                first.mul_(beta1).add_(gradient * (1 - beta1))
                second.mul_(beta2).add_(gradient.square().mul_(1 - beta2))
                root = second.sqrt().mul_((1 - beta2**number) ** -0.5).add_(group["eps"])
                weight.sub_((first / root).mul_(group["lr"] / (1 - beta1**number)))
