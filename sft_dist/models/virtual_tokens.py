"""Prompt tuning (Lester et al., 2021) and prefix tuning (Li and Liang, 2021) on packed rows.

Both learn P positions that stand before a document: as input embeddings (prompt), or as keys and values of every
attention layer (prefix). In a packed row **every** document gets them, at the positions it would have alone:

    row           a a a b b          edges 0 3 5
    with P = 2    v v a a a v v b b  edges 0 5 9, positions 0 1 2 3 4 0 1 2 3

PEFT owns the parameters, so its folders are the ordinary ones; where they go in a packed row is decided here. The
certificate's hidden states are those of the tuned model, so it proves that a packed document sees what it sees alone.

T tokens of the row, N documents, P virtual tokens, L layers, Hk key heads, D size of a head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sft_dist.models.adapted import is_adapted
from sft_dist.types import PackedBatch

if TYPE_CHECKING:
    from peft import PeftModel

warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")


@dataclass(frozen=True, slots=True)
class Layout:
    """A row with P virtual tokens before each document."""

    batch: PackedBatch  # edges, positions and longest length as they are then
    source: Tensor  # int64[N P + T]: where each position comes from in [virtual tokens, row]
    own: Tensor  # int64[T]: where the row's tokens stand

    @staticmethod
    def of(batch: PackedBatch, num: int) -> Layout:
        """Room for `num` virtual tokens before each document, or before each line of a padded batch."""
        if batch.cu_seqlens is None:
            return Layout._padded(batch, num)
        edges, device = batch.cu_seqlens, batch.cu_seqlens.device
        total, documents = batch.input_ids.shape[1], edges.shape[0] - 1
        tokens = torch.arange(total, device=device)
        document = torch.searchsorted(edges[1:], tokens.to(edges.dtype), right=True)
        own = tokens + num * (document + 1)
        virtual = torch.arange(num, device=device)
        added = own.new_zeros(documents * num + total)
        first = edges[:-1].long() + num * torch.arange(documents, device=device)
        added[(first[:, None] + virtual).flatten()] = virtual.repeat(documents)
        source, positions = added.clone(), added
        source[own] = tokens + num
        positions[own] = batch.position_ids[0] + num
        longer = edges + num * torch.arange(documents + 1, device=device, dtype=edges.dtype)
        widened = replace(batch, cu_seqlens=longer, max_seqlen=batch.max_seqlen + num, position_ids=positions[None])
        return Layout(widened, source, own)

    @staticmethod
    def _padded(batch: PackedBatch, num: int) -> Layout:
        assert batch.attention_mask is not None
        rows, width = batch.input_ids.shape
        device = batch.input_ids.device
        virtual = torch.arange(num, device=device)
        mask = torch.cat([batch.attention_mask.new_ones(rows, num), batch.attention_mask], dim=1)
        positions = torch.cat([virtual.expand(rows, -1), batch.position_ids + num], dim=1)
        widened = replace(batch, attention_mask=mask, position_ids=positions, max_seqlen=batch.max_seqlen + num)
        everywhere = torch.arange(num + width, device=device)
        return Layout(widened, everywhere, everywhere[num:])

    def widen(self, virtual: Tensor, row: Tensor, dim: int) -> Tensor:
        """`virtual` (P positions along `dim`) before each document of `row` (T positions)."""
        return torch.cat([virtual, row], dim=dim).index_select(dim, self.source)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Learned keys and values, and where they go; handed through the decoder to every attention layer."""

    layout: Layout
    keys: Tensor  # [L, 1, Hk, P, D]
    values: Tensor

    def widen(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [1, H, T, D], key and value [1, Hk, T, D], all N P longer. Virtual queries are zeros, dropped later."""
        unused = query.new_zeros(*query.shape[:2], self.keys.shape[3], query.shape[3])
        return (
            self.layout.widen(unused, query, dim=2),
            self.layout.widen(self.keys[layer].to(key.dtype), key, dim=2),
            self.layout.widen(self.values[layer].to(value.dtype), value, dim=2),
        )

    def narrow(self, output: Tensor) -> Tensor:
        """[1, N P + T, H, D] -> [1, T, H, D]."""
        return output.index_select(1, self.layout.own)


def kind_of(model: nn.Module) -> str | None:
    """prompt or prefix when `model` carries virtual tokens, else None."""
    if not (is_adapted(model) and model.active_peft_config.is_prompt_learning):
        return None
    return "prefix" if model.active_peft_config.peft_type == "PREFIX_TUNING" else "prompt"


def num_virtual(model: PeftModel) -> int:
    return int(model.active_peft_config.num_virtual_tokens)


def learned(model: PeftModel) -> Tensor:
    """What PEFT's encoder gives: [P, hidden size] of a prompt, [P, L 2 Hk D] of a prefix. Runs its module, so that
    engines that gather per module see it."""
    encoder = model.prompt_encoder[model.active_adapter]
    tokens = torch.arange(num_virtual(model), device=encoder.embedding.weight.device)
    return encoder(tokens)


def prefix_of(model: PeftModel, layout: Layout) -> Prefix:
    """The prefix as attention takes it, in the order in which PEFT lays out layers, keys and values."""
    config = model.active_peft_config
    heads = config.num_attention_heads
    flat = learned(model).view(num_virtual(model), config.num_layers, 2, heads, config.token_dim // heads)
    states = flat.permute(1, 2, 3, 0, 4)  # [L, 2, Hk, P, D]
    return Prefix(layout, states[:, 0, None], states[:, 1, None])
