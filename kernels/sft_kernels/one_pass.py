"""The one-pass loss head: hidden states and LM-head weight in, loss and finished gradients out.

    hidden[T, D] --keep supervised rows--> rows[n, D] --chunks of R rows--> logits[R, V]
                                                                             |  row step: loss[R], then the logits are
                                                                             v  overwritten with their own gradient
    loss = sum of row losses            d_rows = gradient @ weight           d_weight += gradient.T @ rows

Only rows with a label are projected, and they are projected once: 6*D*V*n multiply-adds for a trained head, 4*D*V*n
for a frozen one, instead of 6*D*V*T for plain logits or 8*D*V*n for heads that recompute logits in backward.
At no time do more than one chunk of logits exist. Without gradients (`torch.no_grad`) only the loss is computed.

The row step is the only part that differs between implementations (`head_reference`, `head_triton`).
Letters: T tokens, n supervised tokens, R rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# Logits of one chunk. On an accelerator large enough that 8k tokens of a 150k vocabulary need two chunks: each further
# chunk reads and writes the whole fp32 weight gradient once. On a CPU the same traffic is cheap next to the products
# (64, 128 and 256 MiB measure alike).
CHUNK_BYTES = {"cpu": 128 * 2**20, "default": 1280 * 2**20}


class RowStep(Protocol):
    """Losses of a chunk of logits, which it may overwrite."""

    def __call__(
        self, logits: Tensor, labels: Tensor, weights: Tensor, scale: float, softcap: float | None, gradient: bool
    ) -> Tensor:
        """`weights[r] * cross_entropy(softcap(scale * logits[r]), labels[r])` as [R], fp32 (fp64 for fp64 logits).

        With `gradient` the logits [R, V] are overwritten with the derivative of the sum of these losses.
        """


@dataclass(frozen=True, slots=True)
class Problem:
    """What to project and how; tensors are detached from autograd where it is used."""

    step: RowStep
    labels: Tensor  # int64[T]
    loss_weights: Tensor  # [T]
    num_loss_tokens: int
    scale: float
    softcap: float | None
    chunk_rows: int | None
    dtype: torch.dtype  # of the matrix products

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class Gradients:
    """Derivatives of the loss sum; None where nobody asked."""

    index: Tensor | None  # int64[n], rows of hidden that `rows` belongs to; None: all of them
    rows: Tensor | None = None  # [n, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]


def one_pass_loss(
    step: RowStep,
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
    """Sum over labels != -100 of weight x cross-entropy: a scalar, fp32 (fp64 for fp64 inputs).

    hidden [T, D], weight [V, D], labels int64 [T], loss_weights [T], bias [V] or None. `num_loss_tokens` is the number
    of labels != -100, known on the host: no device synchronisation. A wrong count raises ValueError on a CPU and turns
    the loss into NaN elsewhere. Products run in the autocast dtype if autocast is on, else in the wider dtype of hidden
    and weight; in fp32 on a CPU without instructions for that dtype. `chunk_rows` overrides the memory budget.
    Backward can run once per call.
    """
    _check_shapes(hidden, weight, labels, loss_weights, num_loss_tokens)
    problem = Problem(
        step, labels, loss_weights, num_loss_tokens, float(logit_scale), softcap, chunk_rows, _dtype(hidden, weight)
    )
    if torch.is_grad_enabled():
        loss: Tensor = _OnePassHead.apply(problem, hidden, weight, bias)
        return loss
    return _solve(problem, hidden, weight, bias, (False, False, False))[0]


class _OnePassHead(torch.autograd.Function):
    """Gradients are made in forward; backward only scales them by the incoming scalar."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        loss, ctx.gradients = _solve(problem, hidden, weight, bias, needs)
        ctx.num_rows = hidden.shape[0]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss head's gradients were handed over by an earlier backward: call the head again")
        # In place: the weight gradient is the largest tensor around, and nobody else holds it.
        made = (_scatter(gradients, ctx.num_rows), gradients.weight, gradients.bias)
        scaled = (g if g is None else g.mul_(grad_loss).to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True))
        return (None, *scaled)


def _solve(
    problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Gradients]:
    """Loss and the wanted gradients (of hidden rows, weight, bias) of one problem."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        index = _supervised_rows(problem.labels, problem.num_loss_tokens)
        rows, labels, weights = (
            _take(t, index) for t in (hidden.detach(), problem.labels, problem.loss_weights.detach())
        )
        labels = labels.clamp(min=0)  # a miscounted -100 must reach the NaN below, not a device assert
        rows, matrix = rows.to(problem.dtype), weight.detach().to(problem.dtype)
        gradients = _allocate(problem, index, rows, matrix, weight.dtype, needs)
        offset = None if bias is None else bias.detach().to(problem.dtype)
        loss = _over_chunks(problem, rows, matrix, offset, labels, weights.to(problem.sum_dtype), gradients)
        if gradients.weight is not None:
            gradients.weight = gradients.weight.to(weight.dtype)
        return _poison_wrong_count(loss, problem), gradients


def _over_chunks(
    problem: Problem,
    rows: Tensor,
    matrix: Tensor,
    offset: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Walk the chunks: fill `gradients`, return the sum of the row losses."""
    loss = rows.new_zeros((), dtype=problem.sum_dtype)
    chunks = _chunks(len(rows), matrix.shape[0], problem)
    logits_of = rows.new_empty(max((len(c) for c in chunks), default=0), matrix.shape[0])
    gradient = any(g is not None for g in (gradients.rows, gradients.weight, gradients.bias))
    for number, chunk in enumerate(chunks):
        part = slice(chunk.start, chunk.stop)
        logits = torch.mm(rows[part], matrix.t(), out=logits_of[: len(chunk)])
        if offset is not None:
            logits.add_(offset)
        loss += problem.step(logits, labels[part], weights[part], problem.scale, problem.softcap, gradient).sum()
        if gradients.rows is not None:
            torch.mm(logits, matrix, out=gradients.rows[part])
        if gradients.weight is not None:
            _add_product(gradients.weight, logits.t(), rows[part], first=number == 0)
        if gradients.bias is not None:
            gradients.bias += logits.sum(0, dtype=problem.sum_dtype)
    return loss


def _allocate(
    problem: Problem,
    index: Tensor | None,
    rows: Tensor,
    matrix: Tensor,
    weight_dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> Gradients:
    """Room for the wanted gradients. The weight's is fp32, unless one chunk fills it and its reader wants it narrow."""
    num_chunks = len(_chunks(len(rows), matrix.shape[0], problem))
    written_once = num_chunks == 1 and weight_dtype == problem.dtype
    make = matrix.new_empty if num_chunks else matrix.new_zeros
    return Gradients(
        index,
        rows=torch.empty_like(rows) if needs[0] else None,
        weight=make(matrix.shape, dtype=problem.dtype if written_once else problem.sum_dtype) if needs[1] else None,
        bias=matrix.new_zeros(matrix.shape[0], dtype=problem.sum_dtype) if needs[2] else None,
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """`total (+)= left @ right` without rounding the product to the dtype of its factors first."""
    wide = total.dtype
    if left.dtype == wide or not left.is_cuda:  # only CUDA has products that end wider than their factors
        left, right = left.to(wide), right.to(wide)
        torch.mm(left, right, out=total) if first else torch.addmm(total, left, right, out=total)
    elif first:
        torch.mm(left, right, out_dtype=wide, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=wide, out=total)


def _chunks(num_rows: int, vocabulary: int, problem: Problem) -> list[range]:
    """Even pieces of the supervised rows whose logits fit the budget: no short last piece."""
    kind = problem.labels.device.type
    budget = CHUNK_BYTES.get(kind, CHUNK_BYTES["default"])
    limit = problem.chunk_rows or max(1, budget // (vocabulary * problem.dtype.itemsize))
    pieces = -(-num_rows // limit)
    size = -(-num_rows // pieces) if pieces else 1
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _supervised_rows(labels: Tensor, num_loss_tokens: int) -> Tensor | None:
    """Indices of labels != -100 in order; None when that is every row. Costs no synchronisation."""
    if num_loss_tokens == len(labels):
        return None
    return torch.nonzero_static(labels != IGNORE_INDEX, size=num_loss_tokens, fill_value=0).squeeze(1)


def _take(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _scatter(gradients: Gradients, num_rows: int) -> Tensor | None:
    """Gradient of the supervised rows back among all rows [T, D]."""
    rows, index = gradients.rows, gradients.index
    if rows is None or index is None:
        return rows
    return rows.new_zeros(num_rows, rows.shape[1]).index_copy_(0, index, rows)


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the products: what `F.linear` would use, never narrower than an input."""
    kind = hidden.device.type
    wanted = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
    return torch.float32 if kind == "cpu" and not _cpu_multiplies(wanted) else wanted


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """False for a half precision this CPU only emulates: there fp32 products are 10 times faster, and exact."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _poison_wrong_count(loss: Tensor, problem: Problem) -> Tensor:
    """NaN where `num_loss_tokens` is not the true count: a wrong loss must not look like a loss."""
    true_count = (problem.labels != IGNORE_INDEX).sum()
    if loss.device.type != "cpu":
        return torch.where(true_count == problem.num_loss_tokens, loss, torch.nan)
    if true_count.item() != problem.num_loss_tokens:
        raise ValueError(f"num_loss_tokens={problem.num_loss_tokens} but {true_count.item()} labels are not -100")
    return loss


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, num_loss_tokens: int) -> None:
    tokens, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight {tuple(weight.shape)} must be [V, {width}] for hidden {tuple(hidden.shape)}")
    for name, tensor in (("labels", labels), ("loss_weights", loss_weights)):
        if tensor.shape != (tokens,):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be [{tokens}] for hidden {tuple(hidden.shape)}")
    if not 0 <= num_loss_tokens <= tokens:
        raise ValueError(f"num_loss_tokens={num_loss_tokens} must lie in 0..{tokens}")
