"""Tuning methods: what is trained. Full (with parameters frozen by pattern) or LoRA through PEFT.

Adapters start from (seed, parameter name) alone, so every rank and every world size begins with the same tensors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from sft_dist.config.schema import TuningSection
from sft_dist.errors import ConfigError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> its bits as a number
_BLOCK = 1 << 16  # elements per sum


def apply_tuning(model: PreTrainedModel, tuning: TuningSection, seed: int) -> nn.Module:
    """The model with `requires_grad` set as the recipe says; a PeftModel for LoRA.

    Raises ConfigError when nothing would be trained or a pattern matches nothing.
    """
    tuned = _with_lora(model, tuning, seed) if tuning.method != "full" else _freeze(model, tuning.freeze)
    if not any(parameter.requires_grad for parameter in tuned.parameters()):
        raise ConfigError("tuning.freeze matches every parameter: nothing would be trained")
    return tuned


def frozen_digest(
    model: nn.Module, value: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, parameter: parameter
) -> str | None:
    """SHA-256 that changes with the weights that are not trained, hex; None when all are. `value` gives a parameter's
    values, by default its own.

    They stand in no checkpoint, so a resume must meet them again. Sums of blocks are hashed instead of every byte:
    reading a model once at the speed of memory is all it costs.
    """
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    digest = hashlib.sha256()
    for name, parameter in ((name, value(name, held)) for name, held in frozen):
        bits = parameter.contiguous().flatten().view(_BITS[parameter.element_size()])
        sums = [block.sum(dtype=torch.int64) for block in bits.split(_BLOCK)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {torch.stack(sums).tolist()}".encode())
    return digest.hexdigest() if frozen else None


def is_adapter(model: nn.Module) -> bool:
    """Whether `model` carries a PEFT adapter."""
    return hasattr(model, "peft_config")


def _freeze(model: PreTrainedModel, patterns: list[str]) -> PreTrainedModel:
    for pattern in patterns:
        matched = [parameter for name, parameter in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not matched:
            raise ConfigError(
                f"tuning.freeze: {pattern!r} matches no parameter; names look like {next(model.named_parameters())[0]}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    return model


def _with_lora(model: PreTrainedModel, tuning: TuningSection, seed: int) -> nn.Module:
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        modules_to_save=tuning.modules_to_save or None,
        use_rslora=tuning.method == "rslora",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"tuning.targets={tuning.targets}: {str(error).splitlines()[0]}") from error
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name and not parameter.is_meta:
            parameter.data.copy_(initial_adapter(name, tuple(parameter.shape), seed))
    return adapted


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """LoRA's matrices before the first step, fp32: A as in the paper's code (Kaiming uniform, a = sqrt 5) from a
    generator of its own, B zero."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
