"""The loss head in plain PyTorch: any device, any dtype, and the yardstick of the Triton kernel.

The chunk of logits is walked in blocks that stay in cache, so that the five passes of a softmax and its gradient
cost one trip through memory; in place, because a second logits-sized buffer is what this head exists to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sft_kernels.one_pass import one_pass_loss

# Elements of a block of logits. On 2 cores, [358, 32000]: 2^18 14 ms, 2^20 12 ms, 2^21 11 ms, everything at once 14 ms.
BLOCK_ELEMENTS = {"cpu": 2**21, "default": 2**27}


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
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of weight x cross-entropy over the supervised tokens; see `one_pass.one_pass_loss` for every argument.

    Logits are `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`; no cap when `softcap` is None.
    """
    return one_pass_loss(
        row_step,
        hidden,
        weight,
        labels,
        loss_weights,
        num_loss_tokens=num_loss_tokens,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
    )


def row_step(
    logits: Tensor, labels: Tensor, weights: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """See `one_pass.RowStep`. Works block by block, in the dtype of `weights` (fp32 or fp64)."""
    limit = BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS["default"])
    size = max(1, limit // logits.shape[1])
    blocks = zip(logits.split(size), labels.split(size), weights.split(size), strict=True)
    return torch.cat([_block_step(*block, scale, softcap, gradient) for block in blocks])


def _block_step(
    logits: Tensor, labels: Tensor, weights: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """Losses [R] of one block [R, V]; its logits become their gradient if wanted."""
    z = logits.to(weights.dtype)  # the logits themselves unless they are of a lower precision
    slope = _scale_and_cap(z, scale, softcap, gradient)
    labels, weights = labels.unsqueeze(1), weights.unsqueeze(1)
    peak = z.amax(1, keepdim=True)
    target = z.gather(1, labels)
    total = z.sub_(peak).exp_().sum(1, keepdim=True)
    if gradient:
        z.mul_(weights / total)
        z.scatter_(1, labels, z.gather(1, labels) - weights)
        if slope is not None:
            z.mul_(slope)
        if z is not logits:
            logits.copy_(z)
    return (weights * (total.log() + peak - target)).squeeze(1)


def _scale_and_cap(z: Tensor, scale: float, softcap: float | None, gradient: bool) -> Tensor | float | None:
    """Final logits in place of raw ones; returns their derivative by the raw ones (None: it is one)."""
    if softcap is None:
        if scale == 1.0:
            return None
        z.mul_(scale)
        return scale
    z.mul_(scale / softcap).tanh_()
    slope = z.square().neg_().add_(1.0).mul_(scale) if gradient else None
    z.mul_(softcap)
    return slope
