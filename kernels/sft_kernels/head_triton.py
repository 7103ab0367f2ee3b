"""The loss head with a Triton row step: logits are read twice and written once, whatever the vocabulary.

One program per supervised row. The first sweep keeps a running maximum and a running sum of exponentials (online
log-sum-exp); the second overwrites each logit with its gradient. All arithmetic is fp32, so bf16 logits lose nothing
beyond their own rounding, and the label's column is computed as `p - 1` before it is rounded.

Source of the online log-sum-exp: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
Runs compiled on a GPU, or anywhere under TRITON_INTERPRET=1 (set before triton is first imported; slow, for tests).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sft_kernels.one_pass import one_pass_loss

try:
    import triton
    import triton.language as tl
except ImportError as error:  # an optional package: `unavailable_reason` passes this on
    triton, _IMPORT_ERROR = None, str(error)

MAX_BLOCK = 4096


def unavailable_reason() -> str | None:
    """Why the Triton head cannot run here, or None."""
    if triton is None:
        return f"triton cannot be imported ({_IMPORT_ERROR})"
    if is_interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1, set before the first import of triton, runs it on a CPU)"


def is_interpreted() -> bool:
    """Whether both Triton's own functions and the kernel below were imported under TRITON_INTERPRET=1."""
    return triton is not None and all(type(f).__name__ == "InterpretedFunction" for f in (tl.sum, _row_kernel))


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
    """Sum of weight x cross-entropy over the supervised tokens; the same function as `head_reference`'s."""
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
    """See `one_pass.RowStep`. fp32 arithmetic also for fp64 logits."""
    num_rows, vocabulary = logits.shape
    losses = torch.empty(num_rows, device=logits.device, dtype=torch.float32)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocabulary))
    _row_kernel[(num_rows,)](
        logits,
        labels,
        weights,
        losses,
        logits.stride(0),
        vocabulary,
        scale,
        1.0 if softcap is None else float(softcap),
        HAS_CAP=softcap is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=min(16, max(4, block // 256)),
    )
    return losses


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@_jit
def _row_kernel(
    logits_ptr,  # [R, V], overwritten with the gradient if GRADIENT
    labels_ptr,  # int64[R], in 0..V-1
    weights_ptr,  # fp32[R]
    losses_ptr,  # fp32[R], out
    row_stride,
    vocabulary,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 14k rows of a 152k vocabulary
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    target = scale * tl.load(row_ptr + label, mask=label < vocabulary, other=float("nan")).to(tl.float32)
    if HAS_CAP:
        target = cap * _tanh(target / cap)

    peak = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = scale * tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = cap * _tanh(z / cap)
        z = tl.where(inside, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(z - new_peak), axis=0)
        peak = new_peak
    log_sum = peak + tl.log(total)
    tl.store(losses_ptr + row, weight * (log_sum - target))

    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            z = scale * tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            slope = weight * scale
            if HAS_CAP:
                t = _tanh(z / cap)
                z = cap * t
                slope = slope * (1.0 - t * t)
            p = tl.exp(z - log_sum)
            gradient = slope * tl.where(columns == label, p - 1.0, p)
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
