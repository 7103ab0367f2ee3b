"""The small interface between the loop and whatever shards or replicates the model.

The loop sums gradients over micro-batches and ranks; an engine makes that true. It knows no schedule, no data and no
checkpoint format. After building one, `build_engine` proves that the parallelism asked for is the one obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sft_dist.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Engine:
    """A model made parallel.

    `forward` gives this rank's loss sum; gradients are **summed** over ranks when `accumulate(is_last=True)` closes.
    """

    name: str  # ddp | fsdp2
    packed: nn.Module  # `forward(batch) -> loss sum`, `hidden_states(batch)`, `generate(...)`, and `.model` inside
    forward: Callable[[PackedBatch], Tensor]
    accumulate: Callable[[bool], AbstractContextManager[None]]
    shards_parameters: bool  # ranks must then run the same forwards, also when generating
    reshard: Callable[[], None]  # give back what forwards without a backward have gathered
    trained: dict[str, nn.Parameter]  # by name in the Hugging Face (or PEFT) model; DTensors when sharded

    @property
    def model(self) -> nn.Module:
        """The Hugging Face (or PEFT) model inside."""
        return self.packed.model  # type: ignore[return-value]

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale gradients so that their global 2-norm is at most `max_norm`; returns the norm before, fp32 scalar."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        return full_tensor(norm).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout and gradients off; afterwards training mode and the sharded layout are back."""
        self.packed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.packed.train()
            self.reshard()

    def full_state(self) -> dict[str, Tensor]:
        """Every tensor of the model, gathered, on the CPU. All ranks call; all ranks receive."""
        return {name: full_tensor(tensor.detach()).cpu() for name, tensor in self.model.state_dict().items()}


def trained_parameters(packed: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name in the Hugging Face (or PEFT) model."""
    model: nn.Module = packed.model  # type: ignore[assignment]
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a plain tensor as it is. Collective for DTensors."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
