"""The network of a run before any engine has it: weights, attention kernel, tuning, dtypes, loss head.

Every rank builds the same one. Nothing here depends on how many ranks there are. `build_network` holds all weights in
host memory; `build_empty_network` leaves them in their files until an engine that shards has made room for its part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.config.schema import Recipe
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.base import load_base
from sft_dist.models.load import DTYPES, load_config
from sft_dist.models.packed import Head, causal_lm, pick_head
from sft_dist.models.quantise import move_scales
from sft_dist.models.vocabulary import require_training
from sft_dist.models.weight_files import WeightFiles, empty_model, find_files
from sft_dist.parallel.sequence import ALONE, SequenceGroup, refuse_what_cannot_be_cut, share_dropout

FROM_FILES = ("full", "lora", "rslora", "dora", "bitfit")  # methods that read what they start from out of the files too


@dataclass(frozen=True, slots=True)
class Network:
    """A tuned model on the CPU, and the kernels that it runs with."""

    model: nn.Module  # a PreTrainedModel, or a PeftModel around one
    compute: torch.dtype  # of forward and backward
    backend: str | None  # the segment attention kernel; None: the architecture's own, for padded rows
    head: Head
    kernels: list[tuple[str, str]]  # (part, implementation and why)
    files: WeightFiles | None = None  # where the weights still are: `model` has parameters without memory then

    def value(self, name: str, parameter: Tensor) -> Tensor:
        """The whole value of a parameter, wherever it is."""
        return parameter if self.files is None else self.files.value(name, parameter)

    @property
    def config(self) -> PretrainedConfig:
        """The architecture."""
        return causal_lm(self.model).config


def build_network(
    recipe: Recipe,
    compute: torch.dtype,
    device: torch.device,
    *,
    vocab_size: int,
    num_added: int = 0,
    sequence: SequenceGroup = ALONE,
) -> Network:
    """Load the model on the CPU and tune it for `device`. `vocab_size` is the tokenizer's, whose last `num_added` ids
    may be new to the model; the ranks of a `sequence` group cut rows among them.

    Raises ConfigError with the way out.
    """
    model = load_base(
        recipe.model,
        dtype=base_dtype(recipe, compute),
        seed=recipe.run.seed,
        vocab_size=vocab_size,
        num_added=num_added,
        four_bits=recipe.tuning.method == "qlora",
    )
    network = tune(model, recipe, compute, device, sequence)
    num_new = vocab_size - load_config(recipe.model).get_text_config().vocab_size
    if num_new > 0:
        require_training(network.model, num_new, recipe.tuning.method)
    return network


def build_empty_network(
    recipe: Recipe,
    compute: torch.dtype,
    device: torch.device,
    *,
    vocab_size: int,
    sequence: SequenceGroup = ALONE,
) -> Network | None:
    """The same network with its weights left in their files, to be read when it is sharded. None where that cannot be:
    random weights, methods that need the base's values, tokens that the files have no rows for, files under other names
    or in other formats."""
    if recipe.model.init != "pretrained" or recipe.tuning.method not in FROM_FILES or recipe.model.trust_remote_code:
        return None
    files = find_files(recipe.model, recipe.run.seed, base_dtype(recipe, compute))
    if files is None:
        return None
    model = empty_model(recipe.model, dtype=base_dtype(recipe, compute))
    if vocab_size > model.get_input_embeddings().weight.shape[0]:
        return None
    network = tune(model, recipe, compute, device, sequence)
    return None if files.gap(network.model) else replace(network, files=files)


def base_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """What the base model is held in: the masters when all of it is trained, else what it is computed with."""
    return DTYPES[recipe.precision.master] if recipe.tuning.method == "full" else compute


def tune(
    model: PreTrainedModel,
    recipe: Recipe,
    compute: torch.dtype,
    device: torch.device,
    sequence: SequenceGroup = ALONE,
) -> Network:
    """Choose kernels for `device`, apply the tuning; what is trained is in the master dtype."""
    backend = attention.choose_backend(recipe.model.attention, model.config, device, compute)
    packs = recipe.data.packing != "padded"
    if sequence.size > 1:
        refuse_what_cannot_be_cut(model.config, sequence.size)
    if packs:
        attention.install(model, backend.name, sequence.across)
    tuned = apply_tuning(model, recipe.tuning, recipe.run.seed, compute)
    move_scales(tuned, device)
    share_dropout(tuned, sequence)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[recipe.precision.master])
    head_name, head, head_reason = pick_head(recipe.kernels.head, device)
    used = f"{backend.name} ({backend.reason})" if packs else "the architecture's own (data.packing=padded)"
    kernels = [("attention", used), ("head", f"{head_name} ({head_reason})")]
    return Network(tuned, compute, backend.name if packs else None, head, kernels)
