"""The network of a run before any engine has it: weights, attention kernel, tuning, dtypes, loss head.

Every rank builds the same one. Nothing here depends on how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from sft_dist.config.schema import Recipe
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import DTYPES, load_model
from sft_dist.models.packed import Head, causal_lm, pick_head
from sft_dist.parallel.sequence import ALONE, SequenceGroup, refuse_what_cannot_be_cut, share_dropout


@dataclass(frozen=True, slots=True)
class Network:
    """A tuned model on the CPU, and the kernels that it runs with."""

    model: nn.Module  # a PreTrainedModel, or a PeftModel around one
    compute: torch.dtype  # of forward and backward
    backend: str | None  # the segment attention kernel; None: the architecture's own, for padded rows
    head: Head
    kernels: list[tuple[str, str]]  # (part, implementation and why)

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
    sequence: SequenceGroup = ALONE,
) -> Network:
    """Load, choose kernels for `device`, apply the tuning; what is trained is in the master dtype.

    `vocab_size` is the tokenizer's; the ranks of a `sequence` group cut rows among them. Raises ConfigError with the
    way out.
    """
    master = DTYPES[recipe.precision.master]
    base_dtype = master if recipe.tuning.method == "full" else compute
    model = load_model(recipe.model, dtype=base_dtype, seed=recipe.run.seed, vocab_size=vocab_size)
    backend = attention.choose_backend(recipe.model.attention, model.config, device, compute)
    packs = recipe.data.packing != "padded"
    if sequence.size > 1:
        refuse_what_cannot_be_cut(model.config, sequence.size)
    if packs:
        attention.install(model, backend.name, sequence.across)
    tuned = apply_tuning(model, recipe.tuning, recipe.run.seed, compute)
    share_dropout(tuned, sequence)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    head_name, head, head_reason = pick_head(recipe.kernels.head, device)
    used = f"{backend.name} ({backend.reason})" if packs else "the architecture's own (data.packing=padded)"
    kernels = [("attention", used), ("head", f"{head_name} ({head_reason})")]
    return Network(tuned, compute, backend.name if packs else None, head, kernels)
