"""What of a layer is kept for the backward pass, and where: activation checkpointing (Chen et al., 2016).

    none       everything autograd saves
    selective  of each layer its input, the outputs of attention and of every second matrix product; the rest is
               computed again (Korthikanti et al., 2022, found that most of the memory is cheap to compute)
    full       of each layer its input only; the layer is computed again

With offloading the inputs wait in host memory. The numbers do not change: the same operations run on the same values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from shutil import which
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface

from sft_dist.errors import ConfigError

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear")
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
)


def keep_activations(layers: Sequence[nn.Module], keep: str, *, offload: bool, on_gpu: bool) -> None:
    """Make each of `layers` keep `none` (everything), `selective` or `full` (its input) while it trains.

    `offload` moves what is kept to pinned host memory until the backward pass; without a GPU it is there already.
    Wraps `forward`, inside whatever hooks an engine puts around the layer: those of FSDP2 must not run twice.
    """
    if keep == "none":
        return
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if keep == "selective":
        run = partial(run, context_fn=selective_contexts)
    if offload:
        run = partial(_offloaded, run, on_gpu)
    for layer in layers:
        layer.forward = partial(_when_training, layer, run, layer.forward)


def _when_training(
    layer: nn.Module, run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    return run(forward, *args, **kw) if layer.training and torch.is_grad_enabled() else forward(*args, **kw)


def selective_contexts() -> tuple[Any, Any]:
    """Contexts of the forward pass and of the recomputation: one policy each, as both count matrix products anew."""
    return create_selective_checkpoint_contexts(SavedOutputs())


class SavedOutputs:
    """Which outputs are kept. Counts matrix products apart for the pass that saves and the one that computes again."""

    def __init__(self) -> None:
        self._seen = {False: 0, True: 0}

    def __call__(self, context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = operator.name().split(".")[0]
        if name in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if name in MATRIX_PRODUCTS:
            self._seen[context.is_recompute] += 1
            if self._seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(run: Callable[..., Any], on_gpu: bool, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    with save_on_cpu(pin_memory=on_gpu):
        return run(function, *args, **kw)


def compile_layers(layers: Sequence[nn.Module], attention_name: str | None, *, on_gpu: bool) -> None:
    """torch.compile for each layer by itself: short compilation, one graph for layers that are alike. Before
    `keep_activations`, which computes again what was compiled.

    Attention (`attention_name` in transformers' interface) is left as it is: its kernels are compiled already, or loop
    over documents, which would be compiled anew for every batch. Raises ConfigError on a CPU without a compiler.
    """
    if not on_gpu and not any(map(which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ConfigError(
            "precision.compile=true needs a C++ compiler on a CPU, and there is none: "
            "apt-get install g++, or set precision.compile=false"
        )
    if attention_name is not None:
        kernel = AttentionInterface()[attention_name]
        AttentionInterface.register(attention_name, torch.compiler.disable(kernel))
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
