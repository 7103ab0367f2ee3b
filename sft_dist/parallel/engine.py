"""The small interface between the loop and whatever shards or replicates the model.

The loop sums gradients over micro-batches and ranks, clips, and steps; an engine makes each of these true for the way
it spreads the model. It knows no schedule, no data and no checkpoint format: what has to be saved it shows as named
tensors (`state`), and what was loaded into them it takes over (`adopt`). After building one, `build_engine` proves that
the parallelism asked for is the one obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from sft_dist.types import PackedBatch


class RunOptimizer(torch.optim.Optimizer):
    """An optimizer whose whole state exists before the first step: `step`, and tensors of at least one dimension."""

    def allocate(self, parameters: Iterable[Tensor]) -> None:
        """The state of each tensor, now rather than at the first step: a checkpoint can fill it, and a run that does
        not fit fails at once."""
        raise NotImplementedError


Hold = Callable[[str, nn.Parameter, Tensor], nn.Parameter]


class StoredWeights(Protocol):
    """The values of a model that has no memory yet (its parameters lie on the meta device, its buffers are real)."""

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Memory on `device` and values for what this rank holds of a model that is sharded already."""

    def load(self, model: nn.Module, hold: Hold) -> None:
        """Whole values, one parameter after another: `hold(name, empty parameter, value)` takes its place."""

    def value(self, name: str, parameter: Tensor) -> Tensor:
        """The whole value of one parameter of the Hugging Face (or PEFT) model, in its dtype, on the CPU."""


MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], RunOptimizer]


@dataclass(frozen=True, slots=True)
class Engine:
    """A model made parallel, with the optimizer that moves it.

    `forward` gives this rank's loss sum; gradients are **summed** over ranks when `accumulate(is_last=True)` closes.
    """

    name: str  # ddp | fsdp2 | zero1 | zero2 | zero3
    packed: nn.Module  # `forward(batch) -> loss sum`, `hidden_states(batch)`, `generate(...)`, and `.model` inside
    forward: Callable[[PackedBatch], Tensor]
    accumulate: Callable[[bool], AbstractContextManager[None]]
    clip_grad_norm: Callable[[float], Tensor]  # clips to at most this global 2-norm; the norm before, fp32 scalar
    optimizer: torch.optim.Optimizer
    shards_parameters: bool  # ranks must then run the same forwards, also when generating
    reshard: Callable[[], None]  # give back what forwards without a backward have gathered
    trained: dict[str, nn.Parameter]  # by name in the Hugging Face (or PEFT) model
    state: Callable[[], dict[str, Tensor]]  # `model.NAME` fp32 or as trained, `optim.NAME.KEY`; global shapes
    shows_copies: bool  # `state` gives copies on the host, which no update changes; else the tensors that are trained
    adopt: Callable[[Mapping[str, Tensor]], None]  # what `state` gave and a checkpoint has filled becomes the run's
    gradients: Callable[[], dict[str, Tensor]]  # whole or by shards, as summed for the step at hand; collective
    discard_gradients: Callable[[], None]  # of a step that is not taken
    whole: Callable[[Tensor], Tensor]  # an entry of the model's state dict, gathered; collective

    @property
    def model(self) -> nn.Module:
        """The Hugging Face (or PEFT) model inside."""
        return self.packed.model  # type: ignore[return-value]

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


def live_engine(
    name: str,
    packed: nn.Module,
    forward: Callable[[PackedBatch], Tensor],
    accumulate: Callable[[bool], AbstractContextManager[None]],
    make_optimizer: MakeOptimizer,
    *,
    shards_parameters: bool,
    reshard: Callable[[], None],
) -> Engine:
    """An engine whose parameters and moments are tensors in place (whole or DTensors): nothing to copy for a save."""
    trained = trained_parameters(packed)
    optimizer = make_optimizer(trained)
    optimizer.allocate(trained.values())

    def clip_grad_norm(max_norm: float) -> Tensor:
        return full_tensor(torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)).float()

    def state() -> dict[str, Tensor]:
        weights = {f"model.{name}": parameter.detach() for name, parameter in trained.items()}
        kept = {
            f"optim.{name}.{key}": tensor
            for name, parameter in trained.items()
            for key, tensor in optimizer.state[parameter].items()
            if key != "step"
        }
        return weights | kept

    return Engine(
        name=name,
        packed=packed,
        forward=forward,
        accumulate=accumulate,
        clip_grad_norm=clip_grad_norm,
        optimizer=optimizer,
        shards_parameters=shards_parameters,
        reshard=reshard,
        trained=trained,
        state=state,
        shows_copies=False,
        adopt=_already_in_place,
        gradients=lambda: {name: p.grad for name, p in trained.items() if p.grad is not None},
        discard_gradients=optimizer.zero_grad,
        whole=full_tensor,
    )


def _already_in_place(tensors: Mapping[str, Tensor]) -> None:
    """`state` showed the run's own tensors: filling them was all."""


def trained_parameters(packed: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name in the Hugging Face (or PEFT) model."""
    model: nn.Module = packed.model  # type: ignore[assignment]
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, a plain tensor as it is; shares memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a plain tensor as it is. Collective for DTensors."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_sharded(whole: Tensor, model: Tensor) -> Tensor:
    """`whole`, equal on every rank, sharded as `model` is; without any communication."""
    if not isinstance(model, DTensor):
        return whole
    mesh = model.device_mesh
    everywhere = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=model.placements)


def global_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter over all ranks (ZeRO-3 leaves an empty tensor and keeps the count beside it)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
