"""An adapter folded into its base, matrix by matrix, as the weights are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.checkpoint.weights import Weight
from sft_dist.config.schema import TuningSection
from sft_dist.errors import ConfigError
from sft_dist.models.adapters import ADAPTER
from sft_dist.models.packed import causal_lm


def refuse_to_merge(tuning: TuningSection, run_dir: str | Path) -> None:
    """Raise ConfigError where nothing was added that could be folded into the base."""
    if not tuning.adds_adapter:
        raise ConfigError(
            f"--merge: {run_dir} tuned the model itself (tuning.method={tuning.method}), there is no adapter to merge"
        )
    if not tuning.is_low_rank:
        raise ConfigError(
            f"--merge: {run_dir} learned virtual tokens (tuning.method={tuning.method}), which stand before the input "
            f"and not in the weights; export without --merge"
        )


def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Weight]:
    """The base's weights with the adapter folded in, in `dtype`: each matrix is merged in fp32 when it is read."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lm = causal_lm(model)
    layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, BaseTunerLayer)}
    weights = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        owner, _, part = name.rpartition(".base_layer.")
        stored = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        if ".lora_" in name or ".original_module." in name:
            continue
        read: Callable[[], Tensor] = tensor.detach
        if owner in layers and part == "weight":
            read = partial(_merged, layers[owner])
        weights[stored] = Weight(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype, read)
    return weights


def _merged(layer: Any) -> Tensor:
    """The matrix of one adapted layer with its adapter added in fp32; the layer stays as it is."""
    parameter = layer.get_base_layer().weight
    kept = parameter.data
    parameter.data = kept.to(torch.float32, copy=True)
    try:
        layer.merge()
        return parameter.data
    finally:
        parameter.data = kept
        layer.merged_adapters.clear()
