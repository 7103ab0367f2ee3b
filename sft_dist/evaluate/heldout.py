"""Validation loss: the same sum and the same divisor as training, over packed held-out documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from sft_dist.data.loader import Loader
from sft_dist.parallel.engine import Engine


@dataclass(frozen=True, slots=True)
class Measured:
    """A sum of losses and what it is divided by; measurements of parts add up to that of the whole."""

    loss_sum: float
    divisor: float
    num_loss_tokens: int

    @classmethod
    def nothing(cls) -> Measured:
        return cls(0.0, 0.0, 0)

    @property
    def loss(self) -> float:
        """Loss per supervised token."""
        return self.loss_sum / self.divisor

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.loss_sum + other.loss_sum,
            self.divisor + other.divisor,
            self.num_loss_tokens + other.num_loss_tokens,
        )


def heldout_loss(engine: Engine, loader: Loader, num_steps: int, device: torch.device) -> Measured:
    """The loss over all ranks. `num_steps` steps of an evaluation plan cover the split once.

    No random number is drawn, so evaluating changes nothing in the training that follows.
    """
    divisor, num_loss_tokens, num_before = 0.0, 0, 0
    sums: dict[int, torch.Tensor] = {}  # by number of the micro-batch in the split
    with engine.evaluating():
        for n in range(1, num_steps + 1):
            loaded = loader.step(n)
            divisor += loaded.step.loss_weight_sum
            num_loss_tokens += loaded.step.num_loss_tokens
            for index, batch in zip(loaded.indices, loaded.batches, strict=True):
                loss_sum = engine.packed(batch.to(device))
                if index < len(loaded.step.micro_batches):
                    sums[num_before + index] = loss_sum
            num_before += len(loaded.step.micro_batches)
    total = torch.zeros(num_before, dtype=torch.float64, device=device)
    for number, loss_sum in sums.items():
        total[number] = loss_sum
    dist.all_reduce(total)  # then summed in the plan's order, whoever computed them
    return Measured(total.sum().item(), divisor, num_loss_tokens)
