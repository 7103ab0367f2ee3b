"""The model under an adapter: as it was published, or in 4 bits.

A 4-bit base is quantised while it is read: one matrix is there in its own dtype at a time, so that loading never needs
more than training. Random weights, remote code and files under other names are loaded whole first.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sft_dist.config.schema import ModelSection
from sft_dist.models.load import DTYPES, load_model
from sft_dist.models.quantise import quantise
from sft_dist.models.weight_files import empty_model, find_files, hold_whole

RECORD = "export_certificate.json"  # beside an exported adapter; its `quantised_base` names the dtype of a 4-bit base


def load_base(
    model: ModelSection, *, dtype: torch.dtype, seed: int, vocab_size: int, num_added: int = 0, four_bits: bool
) -> PreTrainedModel:
    """As `load_model`; with `four_bits` its matrices are NF4 codes that multiply in `dtype`."""
    if four_bits and (read := _quantise_while_reading(model, dtype, seed, vocab_size)):
        return read
    whole = load_model(model, dtype=dtype, seed=seed, vocab_size=vocab_size, num_added=num_added)
    return quantise(whole, dtype) if four_bits else whole


def quantised_base(folder: Path) -> torch.dtype | None:
    """In what the 4-bit base of the adapter in `folder` multiplied; None when it was not quantised, or nobody says."""
    record = folder / RECORD
    name = json.loads(record.read_text()).get("quantised_base") if record.is_file() else None
    return DTYPES[name] if name else None


def _quantise_while_reading(
    model: ModelSection, dtype: torch.dtype, seed: int, vocab_size: int
) -> PreTrainedModel | None:
    if model.init != "pretrained" or model.trust_remote_code or (files := find_files(model, seed, dtype)) is None:
        return None
    base = empty_model(model, dtype=dtype)
    if vocab_size > base.get_input_embeddings().weight.shape[0] or files.gap(base):
        return None
    quantise(base, dtype, files.value)
    files.load(base, hold_whole)
    return base
