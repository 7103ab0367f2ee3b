"""The textbook head: all logits at once, then `F.cross_entropy`. What tests trust and benchmarks race against.

Same signature as the real heads. Run it in float64 to get the right answer; its own dtype to get the usual one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_kernels.one_pass import IGNORE_INDEX


def supervised_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    num_loss_tokens: int,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of weight x cross-entropy over labels != -100, in the dtype of the inputs but at least fp32.

    `num_loss_tokens` is part of the signature and not needed here: every row is projected, [T, V] is stored.
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * loss_weights).sum()
