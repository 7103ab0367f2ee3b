"""A base model in 4 bits (QLoRA, Dettmers et al., 2023): NF4 codes with doubly quantised scales, through bitsandbytes.

Every matrix inside the decoder becomes 4-bit codes, one scale per 64 weights, themselves in 8 bits; embeddings, norms
and the output head keep their dtype. So does a matrix whose rows are no multiple of 64: on CPUs bitsandbytes (0.50.2)
reads such codes with the scales of other blocks, without a word. What it decodes is compared with what it was given,
for every matrix.

Quantising is a pure function of the weights, so all ranks hold the same codes. `dequantise` goes back to plain matrices
with the values that the codes stand for: what a merge has to be made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_dist.errors import ConfigError

BLOCK = 64  # weights that share a scale
MAX_ERROR = 0.17  # of a block's largest weight: half of NF4's widest gap (0.152), and the rounding of the scales
REMEDY = "install it with `pip install 'sft_dist[quantised]'`, or use tuning.method=lora"


def quantise(
    model: PreTrainedModel,
    compute: torch.dtype,
    value: Callable[[str, Tensor], Tensor] = lambda _, held: held.data,
) -> PreTrainedModel:
    """`model` with every decoder matrix in NF4, multiplied in `compute`. Raises ConfigError without bitsandbytes, or
    when it has no matrix that can be quantised.

    `value` gives the values of a parameter, by default its own: those of a model without memory come one after another,
    and no two of its matrices are there at once. Codes are stored under the dtype `compute`, because FSDP2 would cast
    bytes of any other.
    """
    bitsandbytes = _library()

    def four_bits(name: str, linear: nn.Linear) -> nn.Module:
        given = value(f"{name}.weight", linear.weight)
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=compute,
            device="meta",
        )
        made.weight = bitsandbytes.nn.Params4bit(
            given, quant_type="nf4", compress_statistics=True, quant_storage=compute, module=made
        ).to(given.device)
        made.bias = linear.bias
        # On some CPUs it would repack the codes in place for inference, under the feet of engines that shard them.
        made.support_avx512bf16_for_cpu = False
        check_codes(given, made.weight.data, made.weight.quant_state)
        return made

    if not _replace(model, nn.Linear, four_bits, lambda linear: linear.in_features % BLOCK == 0):
        raise ConfigError(
            f"tuning.method=qlora: no matrix of {model.config.model_type} has rows of a multiple of {BLOCK} weights, "
            f"so nothing would be quantised; use tuning.method=lora"
        )
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return model


def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The 4-bit matrices of `model` as plain ones of `dtype` with the same values."""
    bitsandbytes = _library()

    def plain(name: str, linear: Any) -> nn.Module:
        state = linear.weight.quant_state
        values = bitsandbytes.functional.dequantize_4bit(linear.weight.data, state)
        made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(values.to(dtype))
        made.bias = linear.bias
        return made

    _replace(model, bitsandbytes.nn.Linear4bit, plain)
    del model.is_loaded_in_4bit
    return model


def check_codes(given: Tensor, codes: Tensor, state: Any) -> None:
    """Raise ConfigError unless `codes` stand for the weights that were `given`, each within what 16 values allow."""
    found = _library().functional.dequantize_4bit(codes, state)
    limit = MAX_ERROR * given.view(-1, BLOCK).abs().amax(dim=1, keepdim=True).float()
    if not bool(((found - given).view(-1, BLOCK).abs().float() <= limit).all()):
        raise ConfigError(
            f"tuning.method=qlora: bitsandbytes decodes a {list(given.shape)} matrix to other values than it got; "
            f"install another version of it, or use tuning.method=lora"
        )


def scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the codes of `model` are multiplied with, by name: part of the frozen weights, though no parameter."""
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            yield from ((f"{name}.{key}", tensor) for key, tensor in sorted(state.as_dict(packed=True).items()))


def move_scales(model: nn.Module, device: torch.device) -> None:
    """The scales to where the codes will be: engines that shard move parameters, and these are none."""
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            module.quant_state.to(device)


def _replace(
    model: PreTrainedModel,
    kind: type[nn.Module],
    make: Callable[[str, Any], nn.Module],
    able: Callable[[Any], bool] = lambda module: True,
) -> int:
    """Exchange the modules of exactly `kind` inside the decoder that are `able`, one by one: the model never stands
    there twice. Returns how many there were."""
    inside = set(model.base_model.modules())
    found = [name for name, module in model.named_modules() if type(module) is kind and module in inside]
    names = [name for name in found if able(model.get_submodule(name))]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, model.get_submodule(name)))
    return len(names)


def _library() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"tuning.method=qlora needs the package bitsandbytes ({error}); {REMEDY}") from error
    return bitsandbytes
