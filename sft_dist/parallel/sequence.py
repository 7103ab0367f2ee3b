"""Sequence parallel: k ranks share each micro-batch, every one holds T/k of its tokens.

    rank 0  [a0 a1 a2 a3 | b0 b1]           rank 1  [b2 b3 b4 | p p p]        one row of T tokens, cut into equal slices
    labels   a1 a2 a3  . | b1 b2                     b3 b4  . | . . .         shifted before the cut: none is lost at it
    edges    0, 4, 9, 12 on both ranks                                        of the whole row, never of the slice

All layers but attention work token by token, so a slice is all they need. For attention the ranks exchange tokens
for heads: each comes to hold all T tokens of 1/k of the heads, runs the same segment kernel with the edges of the whole
row, and the outputs travel back. Loss sums and gradients are added over all ranks anyway: engines and loop do not
change.

Source: Jacobs et al., "DeepSpeed Ulysses" (2023). The exchange is our own: DeepSpeed's knows no edges of documents,
sends query, key and value one by one, and wants a key head for every rank.

k ranks in a group; T tokens of the row; H heads, Hk key heads; D dims of a head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from sft_dist.errors import ConfigError
from sft_dist.parallel.runtime import Runtime, collective_timeout
from sft_dist.types import IGNORE_INDEX, PackedBatch

Kernel = Callable[..., Tensor]
# Rates of random numbers, by the names architectures give them; those of classification heads are not drawn here.
RANDOM = re.compile(r"^(?!classifier|summary|cls).*(dropout|pdrop|jitter)")


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share each micro-batch, seen from one of them. Neighbours share: ranks 0..k-1, k..2k-1, ..."""

    size: int = 1
    index: int = 0  # which slice is this rank's
    group: dist.ProcessGroup | None = None  # None where every rank is alone

    def pad_multiple(self, tokens: int) -> int:
        """The smallest row length that the group divides and that is at least `tokens`."""
        return -(-tokens // self.size) * self.size

    def cut(self, batch: PackedBatch) -> PackedBatch:
        """This rank's tokens of a packed row. Edges and the longest document stay those of the whole row."""
        if self.size == 1:
            return batch
        total = batch.input_ids.shape[1]
        if batch.cu_seqlens is None or total % self.size:
            raise ValueError(f"only a packed row of a multiple of {self.size} tokens can be cut, not {total} tokens")
        length = total // self.size
        own = slice(self.index * length, (self.index + 1) * length)
        labels = batch.labels[:, own]
        return replace(
            batch,
            input_ids=batch.input_ids[:, own],
            labels=labels,
            loss_weights=batch.loss_weights[:, own],
            position_ids=batch.position_ids[:, own],
            num_tokens=min(max(batch.num_tokens - own.start, 0), length),
            num_loss_tokens=int((labels != IGNORE_INDEX).sum()),
        )

    def join(self, states: Tensor) -> Tensor:
        """The slices [1, T/k, D] of all ranks as the row [1, T, D], on every rank."""
        if self.size == 1:
            return states
        slices = [torch.empty_like(states) for _ in range(self.size)]
        dist.all_gather(slices, states.contiguous(), group=self.group)
        return torch.cat(slices, dim=1)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the group, without a gradient."""
        found = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(found, group=self.group)
        return found

    @property
    def across(self) -> Callable[[Kernel], Kernel] | None:
        """What makes a kernel for whole rows one for slices; None where rows are not cut."""
        return None if self.size == 1 else self._across_heads

    def _across_heads(self, kernel: Kernel) -> Kernel:
        """`kernel` for slices: [1, H, T/k, D] -> [1, T/k, H, D]."""

        def attend(query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor | None, **of_row: Any) -> Tensor:
            own_sinks = None if sinks is None else sinks.flatten().chunk(self.size)[self.index]
            return self._to_tokens(kernel(*self._to_heads(query, key, value), sinks=own_sinks, **of_row))

        return attend

    def _to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Query, key and value of all heads, [1, H, T/k, D] -> of this rank's heads, [1, H/k, T, D].

        Key heads that are fewer than ranks, or that ranks do not divide, are repeated first: each rank then holds the
        ones that its query heads share.
        """
        rows, widths, dims = [], [], []
        for tensor in tensors:
            copies = math.lcm(tensor.shape[1], self.size) // tensor.shape[1]
            heads = tensor[0] if copies == 1 else tensor[0].repeat_interleave(copies, dim=0)
            by_rank = heads.unflatten(0, (self.size, -1)).transpose(1, 2).flatten(2)  # [k, T/k, H/k * D]
            rows.append(by_rank)
            widths.append(by_rank.shape[-1])
            dims.append(tensor.shape[-1])
        whole = _AllToAll.apply(self.group, torch.cat(rows, dim=-1)).flatten(0, 1)  # [T, all widths]
        parts = zip(whole.split(widths, dim=-1), dims, strict=True)
        return [part.unflatten(-1, (-1, dim)).transpose(0, 1)[None] for part, dim in parts]

    def _to_tokens(self, out: Tensor) -> Tensor:
        """Outputs of this rank's heads, [1, T, H/k, D] -> of all heads for this rank's tokens, [1, T/k, H, D]."""
        received = _AllToAll.apply(self.group, out[0].unflatten(0, (self.size, -1)))  # [k, T/k, H/k, D], by head group
        return received.transpose(0, 1).flatten(1, 2)[None]


ALONE = SequenceGroup()


class _AllToAll(torch.autograd.Function):
    """Rank r gets every rank's `rows[r]`, in rank order; its own transpose, so the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, rows: Tensor) -> Tensor:
        ctx.group = group
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _AllToAll.apply(ctx.group, gradient)


class RowDropout(nn.Module):
    """Dropout of a slice with the mask that the whole row would draw: the same tokens are dropped at any k.

    The mask of the row, [1, T, D], exists for a moment; what is kept for the backward pass is the slice's.
    """

    def __init__(self, p: float, sequence: SequenceGroup) -> None:
        super().__init__()
        self.p, self._sequence = p, sequence

    def forward(self, x: Tensor) -> Tensor:  # [1, T/k, D]
        if not self.training:
            return x
        if x.ndim != 3:
            raise ConfigError(
                "tuning.dropout with parallel.sequence: this architecture's adapters see tokens in another order than "
                "the row's; set tuning.dropout=0"
            )
        length = x.shape[1]
        row = x.new_ones(x.shape[0], length * self._sequence.size, *x.shape[2:])
        start = self._sequence.index * length
        return x * F.dropout(row, self.p)[:, start : start + length].clone()


def sequence_group(size: int, place: Runtime) -> SequenceGroup:
    """The group of this rank; `size` divides the processes. Collective."""
    if size == 1:
        return ALONE
    group, _ = dist.new_subgroups(size, timeout=collective_timeout())
    return SequenceGroup(size, place.rank % size, group)


def refuse_what_cannot_be_cut(config: PretrainedConfig, size: int) -> None:
    """ConfigError for an architecture whose heads cannot be dealt to `size` ranks, or that draws random numbers itself:
    a rank cannot draw the others' part of a mask."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads or heads % size:
        raise ConfigError(
            f"parallel.sequence={size} does not divide the {heads} attention heads of {text.model_type}; "
            f"use a divisor of them"
        )
    for name, rate in random_rates(text).items():
        raise ConfigError(
            f"parallel.sequence={size}: {text.model_type} has {name}={rate}, whose mask cannot be shared between "
            f"ranks; set it to 0 in the model's config, or parallel.sequence=1"
        )


def random_rates(text: PretrainedConfig) -> dict[str, float]:
    """How much an architecture drops or jitters while training, by the names it gives the rates; those above 0."""
    values = text.to_dict().items()
    return {name: rate for name, rate in values if isinstance(rate, float) and rate and RANDOM.search(name)}


def share_dropout(model: nn.Module, sequence: SequenceGroup) -> None:
    """Make every dropout module of `model` (LoRA's) draw the mask of the whole row. In place; nothing at size 1."""
    if sequence.size == 1:
        return
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in found:
        if isinstance(child, nn.Dropout) and child.p > 0:
            setattr(parent, name, RowDropout(child.p, sequence))
