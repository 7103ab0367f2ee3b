"""A loss or gradient norm that is no number: one verdict for all ranks, a bundle that shows where it came from.

The verdict falls on reduced values, so every rank comes to the same one, and no update was applied. The step's forward
and backward passes are then done once more, on unchanged weights. Another result, finite or not, means that the machine
and not the run is at fault (exit code 77). The same one is written down, and the run stops (70) or, with
`resilience.nonfinite: skip`, goes on with the next step; which steps were skipped is part of the checkpointed state, so
a resumed run skips the same.

The same: every bit of each micro-batch's loss sum, on the rank that computed it, and of the gradient norm; one NaN is
like another. GPU kernels may add in another order each time unless PyTorch was told to use deterministic ones: there it
is which of these numbers are finite.

    logs/attempt_0001/nonfinite-step-00000012/
        report.json          losses of the micro-batches with their examples, norms of all gradients and weights, the
                             first layer or gradient that is not finite (`first_nonfinite`), recipe
        batch.safetensors    tokens and loss weights of every example of the step
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft_dist.data.loader import LoadedStep
from sft_dist.errors import HardwareError, NonFiniteError
from sft_dist.first_nonfinite import first_layer, first_parameter
from sft_dist.job import Job
from sft_dist.observe.run_files import write_json
from sft_dist.parallel.messages import gather_json
from sft_dist.parallel.runtime import Runtime
from sft_dist.parts import Parts
from sft_dist.resilience.run_folder import attempt_dir
from sft_dist.types import StepResult

IN_A_ROW, IN_ALL = 3, 10  # steps that may be skipped: by then it is not the data
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Findings:
    """What the second pass over the step found; equal on every rank."""

    losses: list[float]  # sum of each micro-batch
    gradients: dict[str, float]  # name -> 2-norm
    weights: dict[str, float]
    first: dict[str, str | int] | None  # layer or gradient that is no number, as `first_nonfinite` tells it

    @property
    def culprits(self) -> list[int]:
        """Micro-batches whose own loss is no number; all of them when only a gradient is."""
        return bad_losses(self.losses) or list(range(len(self.losses)))


def skip_or_stop(
    parts: Parts,
    job: Job,
    loaded: LoadedStep,
    result: StepResult,
    skipped: tuple[int, ...],
    again: Callable[[], Tensor],
) -> tuple[int, ...]:
    """The steps that are skipped so far: `skipped`, and this one if it has to be. Collective.

    `again` does the step's forward and backward passes and returns this rank's loss sums by micro-batch. Raises
    NonFiniteError and HardwareError.
    """
    if result.is_finite:
        return skipped
    step = loaded.step.step
    found = examine(parts, loaded, result, again)
    folder = attempt_dir(job.run_dir, job.attempt) / f"nonfinite-step-{step:08d}"
    if parts.place.is_main:
        write_bundle(folder, parts, loaded, result, found)
    rows = [row for number in found.culprits for pack in loaded.step.micro_batches[number] for row in pack.example_ids]
    told = (
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}, the same when done again; no update was "
    )
    told += f"applied. Examples: {rows[:MAX_LISTED]}. Losses, norms and tokens are in {folder}"
    so_far = (*skipped, step)
    if parts.recipe.resilience.nonfinite == "stop":
        raise NonFiniteError(f"{told}. Lower optim.lr, look at the examples, or set resilience.nonfinite=skip")
    if len(so_far) > IN_ALL or so_far[-IN_A_ROW - 1 :] == tuple(range(step - IN_A_ROW, step + 1)):
        raise NonFiniteError(
            f"{told}. {len(so_far)} steps would be skipped, at most {IN_A_ROW} in a row and {IN_ALL} may"
        )
    job.console.say(f"warning: {told}; the step is skipped")
    return so_far


def examine(parts: Parts, loaded: LoadedStep, result: StepResult, again: Callable[[], Tensor]) -> Findings:
    """Do the step's passes again, compare them with `result`, measure every tensor, find the first that is no number.
    Collective; leaves no gradients behind. Raises HardwareError when they were otherwise."""
    engine = parts.engine
    losses = again()
    gradients = norms(engine.gradients())
    grad_norm = engine.clip_grad_norm(parts.recipe.optim.max_grad_norm).double()  # after the norms: it scales
    engine.discard_gradients()
    dist.all_reduce(grad_norm)
    norm_again = grad_norm.item() / dist.get_world_size()
    changed = compare(parts.place, (result.losses.tolist(), losses.tolist()), (result.grad_norm, norm_again))
    if changed:
        raise HardwareError(
            f"step {loaded.step.step}: loss {result.loss}, gradient norm {result.grad_norm}, but done again on the "
            f"same weights {'; '.join(changed[:MAX_LISTED])}: a processor or its memory fails there; run elsewhere to "
            "continue"
        )
    dist.all_reduce(losses)
    losses_of_all = losses[: len(loaded.step.micro_batches)].tolist()
    bad = bad_losses(losses_of_all)
    return Findings(
        losses=losses_of_all,
        gradients=gradients,
        weights=norms({name: t for name, t in engine.state().items() if name.startswith("model.")}),
        first=first_layer(engine, loaded, again, bad[0]) if bad else first_parameter(gradients),
    )


def bad_losses(losses: list[float]) -> list[int]:
    """Numbers of the micro-batches whose loss is no number."""
    return [number for number, loss in enumerate(losses) if not math.isfinite(loss)]


def compare(place: Runtime, losses: tuple[list[float], list[float]], grad_norm: tuple[float, float]) -> list[str]:
    """What differs between a first and a second pass: this rank's loss sums, else the norm that all ranks share, which
    names nobody. Empty when both gave the same. Collective."""
    host, is_same = socket.gethostname(), same_bits if has_steady_kernels(place) else same_kind
    here = f"on rank {place.rank} ({host}, {place.device})"
    mine = [
        f"the loss sum of micro-batch {number} is {second} and not {first} {here}"
        for number, (first, second) in enumerate(zip(*losses, strict=True))
        if not is_same(first, second)
    ]
    told = gather_json([host, mine])
    changed = [line for _, lines in told for line in lines]
    if not changed and not is_same(*grad_norm):
        hosts = ", ".join(sorted({host for host, _ in told}))
        changed = [f"the gradient norm is {grad_norm[1]}, computed on {hosts}"]
    return changed


def has_steady_kernels(place: Runtime) -> bool:
    """Whether the same pass done twice has to give the same bits."""
    return place.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def same_bits(first: float, second: float) -> bool:
    """Equal in every bit, or both NaN."""
    return first.hex() == second.hex()


def same_kind(first: float, second: float) -> bool:
    """Both finite or both not."""
    return math.isfinite(first) == math.isfinite(second)


def norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    """2-norm of each whole tensor, the mean of its replicas' squares where there are several. Collective."""
    if not tensors:
        return {}
    squares = []
    for tensor in tensors.values():
        piece, num_replicas = tensor.detach(), dist.get_world_size()
        if isinstance(piece, DTensor):
            num_replicas //= _num_shards(piece)
            piece = piece.to_local()
        squares.append(piece.double().square().sum() / num_replicas)
    sums = torch.stack(squares)
    dist.all_reduce(sums)
    return dict(zip(tensors, sums.sqrt().tolist(), strict=True))


def _num_shards(tensor: DTensor) -> int:
    """Over how many ranks one copy of it is spread."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def write_bundle(folder: Path, parts: Parts, loaded: LoadedStep, result: StepResult, found: Findings) -> None:
    """Everything needed to look into the step elsewhere. Nothing of the environment: no secret can be in it."""
    folder.mkdir(parents=True, exist_ok=True)
    step, store = loaded.step, parts.inputs.data.train
    examples = {row: store.example(row) for pack in step.packs for row in pack.example_ids}
    report = {
        "step": step.step,
        "epoch": step.epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "first_nonfinite": found.first,
        "batch_digest": loaded.digest,
        "engine": parts.engine.name,
        "world_size": parts.place.world_size,
        "micro_batches": [
            {
                "number": number,
                "loss_sum": loss,
                "examples": {row: examples[row].id for pack in step.micro_batches[number] for row in pack.example_ids},
            }
            for number, loss in enumerate(found.losses)
        ],
        "gradient_norms": found.gradients,
        "weight_norms": found.weights,
        "versions": parts.fingerprint["versions"],
        "config": parts.recipe.model_dump(mode="json"),
    }
    tensors = {}
    for row, example in examples.items():
        tensors[f"{row}.input_ids"] = torch.from_numpy(example.input_ids.copy())
        tensors[f"{row}.loss_weights"] = torch.from_numpy(example.loss_weights.copy())
    save_file(tensors, folder / "batch.safetensors")
    write_json(folder / "report.json", _printable(report))


def _printable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
