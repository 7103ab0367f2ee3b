"""What the ranks of a ZeRO engine hold between them, as whole tensors by name: for checkpoints, exports, certificates.

DeepSpeed's own checkpoints are pickles for one world size. Here one tensor at a time is gathered, and of it this rank
keeps its rows, the very layout of FSDP2: any engine, at any world size, continues what any other saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sft_dist.parallel.engine import full_tensor

Trained = Mapping[str, nn.Parameter]

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's: what DeepSpeed's flat partitions have room for


def state(trained: Trained, mesh: DeviceMesh) -> dict[str, Tensor]:
    """fp32 weights and moments of `trained`, of each this rank's rows as a DTensor on the CPU. Collective."""
    weights = {f"model.{name}": _own_rows(_read(p, None), mesh) for name, p in trained.items()}
    moments = {f"optim.{name}.{key}": _own_rows(_read(p, key), mesh) for name, p in trained.items() for key in MOMENTS}
    return weights | moments


def adopt(trained: Trained, stage: int, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors`, named as in `state`, this engine's. Collective. Below stage 3 the model itself follows only with
    `update_lp_params`."""
    write = write_partition if stage == 3 else _write_fragment
    for name, parameter in trained.items():
        write(parameter, full_tensor(tensors[f"model.{name}"]), None)
        for key in MOMENTS:
            write(parameter, full_tensor(tensors[f"optim.{name}.{key}"]), key)


def gradients(trained: Trained) -> dict[str, Tensor]:
    """The summed gradients, whole, of those that have one. Collective."""
    found = {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _own_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of `whole`, on the CPU, as FSDP2 would shard it."""
    rows = [*whole.chunk(mesh.size()), *[whole[:0]] * mesh.size()][mesh.get_local_rank()].cpu().clone()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def _read(parameter: nn.Parameter, moment: str | None) -> Tensor:
    """The fp32 weight, or its `moment`, gathered."""
    return safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)


def _write_fragment(parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
    """Stages 1 and 2: this rank's part of the flat partition; `update_lp_params` brings it to the model."""
    if moment is None:
        safe_set_full_fp32_param(parameter, whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, moment)


def write_partition(parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
    """Stage 3: master weight and the model's own partition. DeepSpeed's setter of whole tensors runs over the end where
    ranks do not divide the elements, so the piece is cut here."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = dist.get_rank() * size
    piece = torch.zeros(size, dtype=whole.dtype)
    held = whole.flatten()[start : start + size]
    piece[: held.numel()] = held
    if moment is not None:
        safe_set_local_optimizer_state(parameter, piece, moment)
        return
    safe_set_local_fp32_param(parameter, piece)
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(whole)


def gather(tensor: Tensor) -> Tensor:
    """A parameter's whole value, in fp32 where it is trained; other tensors as they are."""
    if tensor.requires_grad:
        return safe_get_full_fp32_param(tensor)
    if not hasattr(tensor, "ds_id"):
        return tensor
    with GatheredParameters([tensor]):
        return tensor.detach().clone()
