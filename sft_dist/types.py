"""The values that flow: Conversation -> TokenizedExample -> Pack -> StepPlan -> PackedBatch -> StepMetrics.

Letters in shapes: L tokens of one document, T tokens of one micro-batch, N documents (segments) in it,
B rows and S columns of a padded micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` None means: as `data.loss_on` says; 0 mutes the turn, 1 trains it, between scales its loss."""

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # tool_calls, name, reasoning_content: handed to the template


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example before any template: messages in order, where it came from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source: str = ""  # path of the file it came from
    id: str = ""  # file:line of the record, stable between runs


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One document as tokens.

    `loss_weights[i]` is the weight of token i *as a target*: 0 context, 1 supervised, between: prompt weight.
    `answers` are the token ranges [start, end) of the learned assistant turns, in order, stop texts included.
    """

    input_ids: np.ndarray  # int32[L]
    loss_weights: np.ndarray  # float32[L]
    source: str = ""
    id: str = ""
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents that share one sequence of at most `seq_len` tokens. Ids are row numbers of the token store."""

    example_ids: tuple[int, ...]
    num_tokens: int
    num_loss_tokens: int  # targets with weight > 0; the first token of a document is never a target
    loss_weight_sum: float  # sum of their weights; equals num_loss_tokens for 0/1 masks
    cost: float  # a * tokens + b * sum of squared lengths, any unit


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step trains on, world size unknown: micro-batches in global order."""

    step: int  # 1-based
    epoch: int  # 0-based
    micro_batches: tuple[tuple[Pack, ...], ...]

    @property
    def packs(self) -> tuple[Pack, ...]:
        return tuple(pack for micro_batch in self.micro_batches for pack in micro_batch)

    @property
    def num_tokens(self) -> int:
        return sum(pack.num_tokens for pack in self.packs)

    @property
    def num_loss_tokens(self) -> int:
        return sum(pack.num_loss_tokens for pack in self.packs)

    @property
    def loss_weight_sum(self) -> float:
        """The divisor of the step's loss sum, known without any collective."""
        return sum(pack.loss_weight_sum for pack in self.packs)


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch on one rank.

    Packed: tensors are [1, T], segments described by `cu_seqlens`, `attention_mask` is None.
    Padded: tensors are [B, S], `attention_mask` is [B, S] (1 = real token), `cu_seqlens` is None.
    Padding in a packed row is a trailing document of its own without labels.
    Under sequence parallel a rank holds a slice [1, T/k] of the row; `cu_seqlens` and `max_seqlen` are the whole row's.
    """

    input_ids: torch.Tensor  # int64
    labels: torch.Tensor  # int64, already shifted inside each document; IGNORE_INDEX where nothing is learned
    loss_weights: torch.Tensor  # float32, aligned with labels
    position_ids: torch.Tensor  # int64, restarts at 0 in each document; 0 in a packed row's padding
    cu_seqlens: torch.Tensor | None  # int32[N+1]
    max_seqlen: int
    num_tokens: int  # without padding
    num_loss_tokens: int  # host-known count of labels != IGNORE_INDEX: no device sync to compact the head
    attention_mask: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`; host-known integers stay on the host."""
        return PackedBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_weights=self.loss_weights.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True),
            max_seqlen=self.max_seqlen,
            num_tokens=self.num_tokens,
            num_loss_tokens=self.num_loss_tokens,
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step found out, equal on every rank but for `losses`."""

    losses: torch.Tensor  # float64 [micro-batches]: loss sums of those this rank computed, zeros elsewhere
    loss: float
    grad_norm: float
    stop: bool  # some rank was asked to
    written: bool  # every rank has written its part of the save under way
    overdue: bool  # some rank's clock asks for a save

    @property
    def is_finite(self) -> bool:
        """Whether the update was applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of `metrics.jsonl`, kind `step` (`skipped` when no update was applied). Counts are global (all ranks),
    seconds are wall time of the step."""

    step: int
    attempt: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    num_loss_tokens: int
    batch_digest: str
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_gib: float
    tokens_by_source: dict[str, int] | None = None  # where the data have several sources
    loss_tokens_by_source: dict[str, int] | None = None  # the same of `num_loss_tokens`
