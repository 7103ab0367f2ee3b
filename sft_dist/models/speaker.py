"""A model as it is used, not trained: an exported folder, an adapter folder, or a hub id.

An adapter folder names its base model; both are loaded, and the tokenizer is the adapter folder's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft_dist.config.schema import ModelSection
from sft_dist.errors import ConfigError
from sft_dist.models.base import load_base, quantised_base
from sft_dist.models.load import first_line, load_model, load_tokenizer
from sft_dist.models.vocabulary import num_added


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model ready to answer, with the tokenizer it came with."""

    model: nn.Module  # a PreTrainedModel, or a PeftModel around one; in evaluation mode
    tokenizer: PreTrainedTokenizerBase


def load_speaker(path: str, *, dtype: torch.dtype, device: torch.device) -> Speaker:
    """The model and tokenizer at `path`. Raises ConfigError when there is none, or its weights cannot be loaded."""
    if _looks_local(path) and not Path(path).is_dir():
        raise ConfigError(f"{path}: no such model folder; a finished run has one in RUN_DIR/export")
    tokenizer = load_tokenizer(ModelSection(path=path))
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    whole = ModelSection(path=path)
    model = (
        _with_adapter(path, dtype, tokenizer) if is_adapter else load_model(whole, dtype=dtype, seed=0, vocab_size=0)
    )
    return Speaker(model.to(device).eval(), tokenizer)


def _with_adapter(path: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The adapter of `path` on the base model that its adapter_config.json names, with rows for the tokens that the
    adapter's tokenizer brought along; in the 4 bits, and the dtype beside them, that it was trained on."""
    from peft import PeftConfig, PeftModel

    base, four_bits = PeftConfig.from_pretrained(path).base_model_name_or_path, quantised_base(Path(path))
    if not base:
        raise ConfigError(f"{path}: adapter_config.json names no base model; set base_model_name_or_path there")
    model = load_base(
        ModelSection(path=base),
        dtype=four_bits or dtype,
        seed=0,
        vocab_size=len(tokenizer),
        num_added=num_added(tokenizer),
        four_bits=four_bits is not None,
    )
    try:
        return PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: the adapter does not fit {base} ({first_line(error)})") from error


def _looks_local(path: str) -> bool:
    """Whether `path` cannot be a hub id (name or owner/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")
