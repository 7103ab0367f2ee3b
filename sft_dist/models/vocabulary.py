"""Embeddings for the tokens that the user's tokenizer has and the model does not.

Nothing here adds a token: it gives rows to those that somebody put into `model.tokenizer`. A row starts as the mean of
all others, so its logit is an average one and no other token's probability collapses (Hewitt, 2021). A tokenizer whose
*ordinary* vocabulary is too large belongs to another model and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft_dist.errors import ConfigError
from sft_dist.models.packed import causal_lm


def num_added(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the tokenizer's last ids are added tokens, without a gap."""
    added = set(tokenizer.get_added_vocab().values())
    size = len(tokenizer)
    return next((count for count in range(size) if size - 1 - count not in added), size)


def check_rows(rows: int, vocab_size: int, num_added: int) -> None:
    """Raise ConfigError when an embedding of `rows` lacks more than the tokenizer's last `num_added` ids."""
    if vocab_size - rows > num_added:
        raise ConfigError(
            f"model: the tokenizer has {vocab_size} ids but the embedding only {rows} rows: "
            f"use the model's own tokenizer"
        )


def grow(model: PreTrainedModel, vocab_size: int, num_added: int) -> None:
    """Room for `vocab_size` ids, of which the last `num_added` may be new. Draws no random number.

    Raises ConfigError when more would be missing.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    check_rows(rows, vocab_size, num_added)
    if vocab_size <= rows:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                _fill_with_mean(tensor, rows)


def require_training(tuned: nn.Module, num_new: int, method: str) -> None:
    """Raise ConfigError unless the embeddings are trained: `num_new` of their rows mean nothing yet."""
    lm = causal_lm(tuned)
    edges = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if all(any(parameter.requires_grad for parameter in module.parameters()) for module in edges):
        return
    names = [name.rpartition(".")[2] for name, module in lm.named_modules() if module in edges]
    raise ConfigError(
        f"model.tokenizer has {num_new} tokens that the model has no embedding for, and tuning.method={method} would "
        f"leave their new ones untrained; set tuning.modules_to_save=[{', '.join(names)}] beside a LoRA method"
    )


@torch.no_grad()
def _fill_with_mean(tensor: Tensor, rows: int) -> None:
    tensor[rows:] = tensor[:rows].float().mean(dim=0).to(tensor.dtype)
