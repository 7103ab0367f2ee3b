"""AdamW (Loshchilov and Hutter, 2019), PyTorch's fused kernel: one pass over weights, gradients and moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sft_dist.parallel.engine import RunOptimizer


class AdamW(torch.optim.AdamW, RunOptimizer):
    """Two moments in the parameter's dtype."""

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
