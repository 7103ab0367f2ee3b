"""Which parameters decay, and which learn faster than others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sft_dist.config.schema import OptimSection

# Embeddings and output heads by the names that architectures of transformers give them.
_EDGE = re.compile(r"(^|\.)(embed\w*|word_embeddings|wte|wpe|lm_head)\.")


def parameter_groups(parameters: Mapping[str, nn.Parameter], optim: OptimSection) -> list[dict[str, Any]]:
    """Groups with their own `weight_decay` and `lr_scale` (times the step's learning rate), decaying ones first.

    LoRA+ (Hayou et al., 2024): the B matrices of LoRA learn `optim.lora_plus_ratio` times as fast as the rest.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = optim.weight_decay if decays(name, parameter) else 0.0
        scale = optim.lora_plus_ratio if optim.lora_plus_ratio and ".lora_B." in name else 1.0
        found.setdefault((decay, scale), []).append(parameter)
    ordered = sorted(found.items(), key=lambda entry: entry[0], reverse=True)
    return [{"params": members, "weight_decay": decay, "lr_scale": scale} for (decay, scale), members in ordered]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms and biases do not, also where an architecture stacks them into matrices (experts)."""
    return parameter.ndim >= 2 and not name.endswith("bias") and "norm" not in name.lower()


def is_edge(name: str) -> bool:
    """Whether a parameter turns tokens into vectors or vectors into logits."""
    return _EDGE.search(name) is not None
