"""How a micro-batch enters the decoder: as token ids, or as embeddings with noise on them or virtual tokens before
each document. The value made here carries the difference; the forward is one line for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_dist.models.virtual_tokens import Layout, kind_of, learned, num_virtual, prefix_of
from sft_dist.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Entry:
    """What the decoder is called with, besides what keeps documents apart."""

    inputs: Mapping[str, Tensor]  # input_ids [B, S], or inputs_embeds [B, S, D]; position_ids
    batch: PackedBatch  # where documents start and end for attention
    extra: Mapping[str, Any] = field(default_factory=dict)  # for our own attention
    own: Tensor | None = None  # the documents' positions among the inputs, where there are others

    def narrow(self, hidden: Tensor) -> Tensor:
        """The documents' own hidden states."""
        return hidden if self.own is None else hidden.index_select(1, self.own)


def enter(model: nn.Module, lm: PreTrainedModel, batch: PackedBatch, noise_alpha: float) -> Entry:
    """`model` is `lm`, or a PeftModel around it. `noise_alpha` is 0 without NEFTune noise."""
    kind = kind_of(model)
    if kind is None and not noise_alpha:
        return Entry({"input_ids": batch.input_ids, "position_ids": batch.position_ids}, batch)
    embedded = lm.get_input_embeddings()(batch.input_ids)
    if noise_alpha:
        embedded = embedded + neftune_noise(batch, embedded, noise_alpha)
    if kind is None:
        return Entry({"inputs_embeds": embedded, "position_ids": batch.position_ids}, batch)
    layout = Layout.of(batch, num_virtual(model))
    if kind == "prefix":  # the row keeps its length; its tokens stand behind the prefix
        positions = batch.position_ids + num_virtual(model)
        inputs = {"inputs_embeds": embedded, "position_ids": positions}
        return Entry(inputs, layout.batch, {"prefix": prefix_of(model, layout)})
    virtual = learned(model).to(embedded.dtype).expand(embedded.shape[0], -1, -1)
    inputs = {
        "inputs_embeds": layout.widen(virtual, embedded, dim=1),
        "position_ids": layout.batch.position_ids,
    }
    return Entry(inputs, layout.batch, own=layout.own)


def neftune_noise(batch: PackedBatch, embedded: Tensor, alpha: float) -> Tensor:
    """Uniform noise of at most alpha / sqrt(L d) on the embeddings of a document of L tokens (Jain et al., 2023).

    Drawn from the generator that the step seeds with (seed, step, micro-batch), so neither a resume nor the number of
    ranks changes it. In a packed row L is the length of each document, not of the row.
    """
    noise = torch.rand_like(embedded, dtype=torch.float32) * 2 - 1
    bound = alpha / (document_lengths(batch) * embedded.shape[-1]).sqrt()
    return (noise * bound[..., None]).to(embedded.dtype)


def document_lengths(batch: PackedBatch) -> Tensor:
    """float32 [B, S]: the length of the document that each token is part of."""
    if batch.cu_seqlens is None:
        assert batch.attention_mask is not None
        return batch.attention_mask.sum(dim=1, keepdim=True).float().expand(batch.input_ids.shape)
    edges = batch.cu_seqlens
    tokens = torch.arange(batch.input_ids.shape[1], device=edges.device, dtype=edges.dtype)
    return edges.diff().float()[torch.searchsorted(edges[1:], tokens, right=True)][None]
