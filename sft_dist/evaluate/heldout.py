"""Validation loss: the same sum and the same divisor as training, over packed held-out documents."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sft_dist.data.loader import Loader
from sft_dist.parallel.engine import Engine


def heldout_loss(engine: Engine, loader: Loader, num_steps: int, device: torch.device) -> tuple[float, int]:
    """(loss per supervised token, number of supervised tokens) over all ranks.

    `num_steps` steps of an evaluation plan cover the split once. No random number is drawn, so
    evaluating changes nothing in the training that follows.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    divisor, num_loss_tokens = 0.0, 0
    with engine.evaluating():
        for n in range(1, num_steps + 1):
            loaded = loader.step(n)
            divisor += loaded.step.loss_weight_sum
            num_loss_tokens += loaded.step.num_loss_tokens
            for batch in loaded.batches:
                total += engine.packed(batch.to(device)).double()
    dist.all_reduce(total)
    return total.item() / divisor, num_loss_tokens
