"""Tuning methods: what is trained. Full (with parameters frozen by pattern), biases alone (BitFit), or what PEFT adds:
LoRA, rsLoRA, DoRA, LoRA over a 4-bit base (QLoRA), prefix and prompt tuning.

What is added starts from (seed, parameter name) alone, so every rank and every world size begins with the same tensors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_dist.config.schema import TuningSection
from sft_dist.errors import ConfigError
from sft_dist.models.quantise import dequantise, quantise, scales

if TYPE_CHECKING:
    from peft import PeftConfig

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> its bits as a number
_BLOCK = 1 << 16  # elements per sum

ADAPTER = "default"  # what PEFT calls the only one
LOW_RANK = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


def apply_tuning(
    model: PreTrainedModel, tuning: TuningSection, seed: int, compute: torch.dtype = torch.float32
) -> nn.Module:
    """The model with `requires_grad` set as the recipe says; a PeftModel where something is added.

    `compute` is the dtype in which a 4-bit base multiplies. Raises ConfigError when nothing would be trained, a pattern
    matches nothing, or the architecture does not have what the method needs.
    """
    if tuning.method == "full":
        tuned: nn.Module = _freeze(model, tuning.freeze)
    elif tuning.method == "bitfit":
        tuned = _biases_only(model)
    elif tuning.method in ("prefix", "prompt"):
        tuned = _with_virtual_tokens(model, tuning, seed)
    else:
        base = _in_four_bits(model, compute) if tuning.method == "qlora" else model
        tuned = _with_lora(base, tuning, seed)
    if not any(parameter.requires_grad for parameter in tuned.parameters()):
        raise ConfigError("tuning.freeze matches every parameter: nothing would be trained")
    return tuned


def apply_tuning_plain(model: PreTrainedModel, tuning: TuningSection, seed: int, compute: torch.dtype) -> nn.Module:
    """As `apply_tuning`, but a 4-bit base has become float32 matrices of the same values: to merge into, or to compute
    with on any machine."""
    if tuning.method == "qlora":
        model, tuning = (
            dequantise(_in_four_bits(model, compute), torch.float32),
            tuning.model_copy(update={"method": "lora"}),
        )
    return apply_tuning(model, tuning, seed, compute)


def frozen_digest(model: nn.Module, value: Callable[[str, Tensor], Tensor] = lambda _, held: held) -> str | None:
    """SHA-256 that changes with the weights that are not trained, hex; None when all are. `value` gives a parameter's
    values, by default its own.

    They stand in no checkpoint, so a resume must meet them again. Sums of blocks are hashed instead of every byte:
    reading a model once at the speed of memory is all it costs. The scales of a 4-bit base count as weights.
    """
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    digest = hashlib.sha256()
    of_model = ((name, value(name, held)) for name, held in frozen)
    for name, tensor in chain(of_model, scales(model)):
        bits = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
        sums = [block.sum(dtype=torch.int64) for block in bits.split(_BLOCK)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {torch.stack(sums).tolist()}".encode())
    return digest.hexdigest() if frozen else None


def is_adapter(model: nn.Module) -> bool:
    """Whether `model` carries a PEFT adapter."""
    return hasattr(model, "peft_config")


def _in_four_bits(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """`model` quantised, unless that was done while it was read."""
    return model if getattr(model, "is_loaded_in_4bit", False) else quantise(model, compute)


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


def _biases_only(model: PreTrainedModel) -> PreTrainedModel:
    """BitFit (Ben Zaken et al., 2022): every bias the architecture has, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"tuning.method=bitfit trains biases and {model.config.model_type} has none; use tuning.method=lora"
        )
    return model


def _with_lora(model: PreTrainedModel, tuning: TuningSection, seed: int) -> nn.Module:
    from peft import LoraConfig

    embeddings = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
    copies_embedding = any(name.rpartition(".")[2] in embeddings for name in tuning.modules_to_save)
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        modules_to_save=tuning.modules_to_save or None,
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
        # Without it PEFT copies a tied matrix twice, and the two drift apart (huggingface/peft#2777).
        ensure_weight_tying=copies_embedding and bool(model.config.get_text_config().tie_word_embeddings),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = _adapted(model, config, seed)
    except ValueError as error:
        raise ConfigError(f"tuning.targets={tuning.targets}: {str(error).splitlines()[0]}") from error
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in LOW_RANK) and not parameter.is_meta:
            parameter.data.copy_(initial_adapter(name, tuple(parameter.shape), seed))
    return adapted


def _with_virtual_tokens(model: PreTrainedModel, tuning: TuningSection, seed: int) -> nn.Module:
    """A prompt starts as embeddings of random tokens (Lester et al., 2021), a prefix as small numbers around zero."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    kind = PrefixTuningConfig if tuning.method == "prefix" else PromptTuningConfig
    adapted = _adapted(model, kind(num_virtual_tokens=tuning.virtual_tokens, task_type="CAUSAL_LM"), seed)
    words = model.get_input_embeddings().weight
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and tuning.method == "prefix":
            nn.init.normal_(parameter, std=spread, generator=_generator(seed, name))
        elif parameter.requires_grad:
            tokens = torch.randint(0, words.shape[0], (len(parameter),), generator=_generator(seed, name))
            parameter.data.copy_(words[tokens])
    return adapted


def _adapted(model: PreTrainedModel, config: PeftConfig, seed: int) -> nn.Module:
    """What PEFT makes of `model`. Whatever it draws is a function of the seed; the caller's generator stands still."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """LoRA's matrices before the first step, fp32: A as in the paper's code (Kaiming uniform, a = sqrt 5), from a
    generator of its own, and B zero; for embeddings A zero and B normal."""
    if ".lora_A." in name:
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=_generator(seed, name))
    if "lora_embedding_B" in name:
        return nn.init.normal_(torch.empty(shape), generator=_generator(seed, name))
    return torch.zeros(shape)


def _generator(seed: int, name: str) -> torch.Generator:
    """Of one parameter: what it draws depends on nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
