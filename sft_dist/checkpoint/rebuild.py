"""A run's model, loaded anew: as it was before the first step, with a checkpoint's weights, or its base alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft_dist.checkpoint.export_certificate import Base
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.checkpoint.shards import read_shards
from sft_dist.config.schema import Recipe
from sft_dist.errors import CheckpointError
from sft_dist.models.adapters import apply_tuning, apply_tuning_plain
from sft_dist.models.base import load_base
from sft_dist.models.load import DTYPES
from sft_dist.models.vocabulary import num_added

WEIGHTS_PREFIX = "model."


def compute_dtype(run_dir: Path, recipe: Recipe) -> torch.dtype:
    """The dtype the run computed in: what `auto` meant is in its fingerprint."""
    record = run_dir / "fingerprint.json"
    chosen = json.loads(record.read_text())["choices"]["compute"] if record.is_file() else recipe.precision.compute
    return DTYPES.get(chosen, torch.float32)


def rebuild(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, compute: torch.dtype, merging: bool) -> nn.Module:
    """The run's model as it was before its first step; for merging, a 4-bit base as plain matrices of the values that
    its codes stand for: those the adapter was trained on."""
    master, tuning = DTYPES[recipe.precision.master], recipe.tuning
    dtype = master if tuning.method == "full" else compute
    model = _base(recipe, tokenizer, dtype)
    tuned = (apply_tuning_plain if merging else apply_tuning)(model, tuning, recipe.run.seed, compute)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    return tuned


def base_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, compute: torch.dtype, num_parameters: int) -> Base:
    """What an adapter of this run, with so many parameters under it, was trained on: to be loaded anew."""
    four_bits = recipe.tuning.method == "qlora"
    dtype = str(compute).removeprefix("torch.") if four_bits else None
    return Base(num_parameters * compute.itemsize, partial(_base, recipe, tokenizer, compute), dtype)


def _base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    return load_base(
        recipe.model,
        dtype=dtype,
        seed=recipe.run.seed,
        vocab_size=len(tokenizer),
        num_added=num_added(tokenizer),
        four_bits=recipe.tuning.method == "qlora",
    )


def fill(model: nn.Module, folder: Path) -> None:
    """Read the checkpoint's weights into the parameters of the same names, in place."""
    wanted = {name: entry for name, entry in read_manifest(folder).tensors.items() if name.startswith(WEIGHTS_PREFIX)}
    parameters = {f"{WEIGHTS_PREFIX}{name}": parameter.data for name, parameter in model.named_parameters()}
    for name, entry in wanted.items():
        if name not in parameters or tuple(parameters[name].shape) != entry.shape:
            raise CheckpointError(f"{folder}: {name} does not fit the model that the run's config.yaml describes")
    read_shards(folder, {name: parameters[name] for name in wanted})
