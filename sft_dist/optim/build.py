"""The optimizer that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sft_dist.config.schema import OptimSection
from sft_dist.optim.adafactor import Adafactor
from sft_dist.optim.adamw import AdamW
from sft_dist.optim.adamw8bit import AdamW8bit
from sft_dist.optim.adamw_exact import ExactAdamW
from sft_dist.optim.groups import is_edge, parameter_groups
from sft_dist.optim.muon import Muon
from sft_dist.optim.stochastic import StochasticAdamW
from sft_dist.parallel.engine import RunOptimizer


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    optim: OptimSection,
    lr: float,
    *,
    rounding_seed: int | None = None,
    exact: bool = False,
) -> RunOptimizer:
    """`optim.name` over `parameters`, which carry their names in the model. The engine has the state allocated: only it
    knows which tensors are moved (`RunOptimizer.allocate`).

    `rounding_seed`: weights and moments are bfloat16, rounded stochastically (`precision.stochastic_rounding`).
    `exact`: the bits of AdamW's update are those of any sharding (`run.deterministic: elastic`).
    """
    groups = parameter_groups(parameters, optim)
    adam: dict[str, Any] = {"lr": lr, "betas": optim.betas, "eps": optim.eps}
    if rounding_seed is not None:
        return StochasticAdamW(groups, names=parameters, seed=rounding_seed, **adam)
    if optim.name == "adamw8bit":
        return AdamW8bit(groups, **adam)
    if optim.name == "adafactor":
        return Adafactor(groups, lr=lr)
    if optim.name == "muon":
        matrices = {id(p) for name, p in parameters.items() if p.ndim == 2 and not is_edge(name)}
        return Muon(groups, matrices=matrices, **adam)
    return ExactAdamW(groups, **adam) if exact else AdamW(groups, fused=True, **adam)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Continue counting after `step` completed steps (bias correction depends on it)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(step))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The step's learning rate, times what a group's own scale is."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
