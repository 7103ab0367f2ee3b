"""FSDP2 sums whose bits do not depend on how many ranks take part (`run.deterministic: elastic`).

Floating-point sums depend on their order, and the order of all others in a step follows from the number of ranks: of
gradients over ranks and micro-batches, and of squares over shards in the gradient norm. Here each has one order:

    gradients   the binary tree over the global numbers of the micro-batches. Round j of W ranks holds the numbers
                jW .. jW + W - 1, a whole subtree because W is a power of two:

                    0   1   2   3   4   5   6   7
                    +---+   +---+   +---+   +---+      inside a round: the ranks, by `TreeReduceScatter`
                      +-------+       +-------+        over rounds: `TreeSum`, log2(rounds) gradient shards held
                          +---------------+

    norm        squares of a row in float64, folded; the sums of all rows in the order of parameters and rows, folded

Everything else in a step is elementwise, or done on one rank with whole parameters. A micro-batch that only fills the
last round adds zeros to the tree's right edge. Every micro-batch is reduced by itself, so no rank ever holds
accumulated whole gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sft_dist.parallel.engine import Engine, local_part

NORM_ELEMENTS = 1 << 22  # of a gradient in float64 at a time


def with_exact_sums(engine: Engine) -> Engine:
    """`engine` (fsdp2, on a power of two of ranks) with every sum over ranks and micro-batches in canonical order."""
    reduce_scatter = TreeReduceScatter()
    for module in engine.packed.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(reduce_scatter)  # type: ignore[arg-type]  # its base class is private
    parameters = list(engine.trained.values())
    tree = TreeSum()

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        yield
        assert reduce_scatter.was_called or dist.get_world_size() == 1, "FSDP2 reduced gradients by another way"
        tree.add([_take_gradient(parameter) for parameter in parameters])
        if is_last:
            for parameter, total in zip(parameters, tree.take(), strict=True):
                parameter.grad = total

    def clip_grad_norm(max_norm: float) -> Tensor:
        gradients = [parameter.grad for parameter in parameters]
        norm = global_norm(gradients)  # type: ignore[arg-type]
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for gradient in gradients:
            local_part(gradient).mul_(scale)  # type: ignore[arg-type]
        return norm.float()

    return replace(engine, accumulate=accumulate, clip_grad_norm=clip_grad_norm)


class TreeReduceScatter:
    """A reduce-scatter of sums for `FSDPModule.set_custom_reduce_scatter`: rank r gets the r-th of W equal pieces,
    each element summed over ranks as ((0 + 1) + (2 + 3)) + ...

    It has the methods of PyTorch's `ReduceScatter` (2.11 to 2.13), which is in a private module, rather than being one.
    The ranks exchange as many bytes as in a plain reduce-scatter, and the pieces take as much memory as the input.
    """

    def __init__(self) -> None:
        self.was_called = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """input [W * n], output [n]."""
        assert op == dist.ReduceOp.SUM and not async_op, "only sums that are waited for"
        self.was_called = True
        pieces = torch.empty_like(input_tensor)
        dist.all_to_all_single(pieces, input_tensor, group=group)
        rows = pieces.view(group.size(), -1)
        while len(rows) > 1:
            rows = rows[0::2] + rows[1::2]
        output_tensor.copy_(rows[0])


class TreeSum:
    """Adds lists of tensors as a binary tree over their order; holds one partial sum for each level. Works in place."""

    def __init__(self) -> None:
        self._partial: list[tuple[int, list[Tensor]]] = []  # (level, sum of 2^level lists), levels falling

    def add(self, tensors: list[Tensor]) -> None:
        level = 0
        while self._partial and self._partial[-1][0] == level:
            tensors = _add(self._partial.pop()[1], tensors)
            level += 1
        self._partial.append((level, tensors))

    def take(self) -> list[Tensor]:
        """The sum of all that were added, after which the tree is empty. No negative zeros: filling adds positive
        ones at some world sizes only."""
        total = self._partial.pop()[1]
        while self._partial:
            total = _add(self._partial.pop()[1], total)
        for tensor in total:
            local_part(tensor).add_(0.0)
        return total


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """float64 2-norm of all `gradients`, DTensors sharded by rows over all ranks."""
    sums = torch.zeros(sum(map(len, gradients)), dtype=torch.float64, device=local_part(gradients[0]).device)
    start = 0
    for gradient in gradients:
        rows = local_part(gradient)
        first = start + _first_row(gradient)
        sums[first : first + len(rows)] = row_squares(rows)
        start += len(gradient)
    dist.all_reduce(sums)  # each row is of one rank, and zero on the others
    return fold(sums).sqrt()


def row_squares(rows: Tensor) -> Tensor:
    """float64 [R] of [R, ...]: the sum of the squares of each row, whichever rows are beside it."""
    flat = rows.reshape(len(rows), -1) if rows.numel() else rows.new_zeros(len(rows), 1)
    parts = flat.split(max(1, NORM_ELEMENTS // flat.shape[1]))
    return torch.cat([fold(part.double().square()) for part in parts])


def fold(values: Tensor) -> Tensor:
    """Sum over the last axis by adding its second half to its first until one is left: elementwise, so the bits follow
    from the axis alone (a reduction may split its work by the shape of the whole)."""
    while (length := values.shape[-1]) > 1:
        if length % 2:
            values, length = torch.nn.functional.pad(values, (0, 1)), length + 1
        values = values[..., : length // 2] + values[..., length // 2 :]
    return values[..., 0]


def _first_row(tensor: Tensor) -> int:
    """Global number of this rank's first row; FSDP2 cuts as `Tensor.chunk` does."""
    if not isinstance(tensor, DTensor):
        return 0
    size = -(-len(tensor) // tensor.device_mesh.size())
    return min(len(tensor), size * tensor.device_mesh.get_local_rank())


def _take_gradient(parameter: torch.nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _add(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    for a, b in zip(first, second, strict=True):
        local_part(a).add_(local_part(b))
    return first
