"""The optimizer, and the learning rate as a function of the step.

There is no scheduler object: lr = f(step). Adam's own step counter equals the run's step, so the only tensors to save
are the two moments of each trained parameter, which the engine shows by name (`Engine.state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from sft_dist.config.schema import OptimSection


def build_optimizer(parameters: Mapping[str, nn.Parameter], optim: OptimSection, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019); no decay on vectors (norms, biases). The engine allocates the moments: only
    it knows which tensors are moved (`sft_dist.parallel.engine.MakeOptimizer`)."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Continue counting after `step` completed steps (bias correction depends on it)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(step))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, peak: float, num_steps: int, schedule: str, warmup_fraction: float) -> float:
    """Learning rate of 1-based `step`: linear warm-up to `peak`, then cosine or linear to zero, or constant."""
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup - 1) / max(1, num_steps - num_warmup)
    return peak * SCHEDULES[schedule](progress)


SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}
