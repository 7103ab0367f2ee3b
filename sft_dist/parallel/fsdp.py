"""FSDP2: parameters, gradients and optimizer state sharded over ranks with `fully_shard`, one group per layer.

    dp_replicate = 1    every rank holds 1/W of the state
    dp_replicate = k    HSDP: k replicas of W/k shards; neighbouring ranks (a node) share a replica, and gather and
                        scatter among themselves; only sums of gradients travel between replicas, once per step

The same code on CPU (gloo) and GPU (nccl). Gradients are summed, not averaged: gloo has no scaled sum, and the loop
already divides by the global token count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from sft_dist.parallel.engine import Engine, MakeOptimizer, StoredWeights, live_engine
from sft_dist.parallel.runtime import Runtime


def build_fsdp(
    packed: nn.Module,
    layers: Sequence[nn.Module],
    place: Runtime,
    compute_dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
    dp_replicate: int,
    weights: StoredWeights | None = None,
) -> Engine:
    """Shard `packed` in place over W / `dp_replicate` ranks, each of `layers` as a group of its own.

    Parameters keep their dtype, forward and backward run in `compute_dtype`, gradient sums in fp32. A
    model on the meta device gets memory and values from `weights` once it is sharded.
    """
    mesh = data_mesh(place, dp_replicate)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(packed, mesh=mesh, mp_policy=policy)
    if weights is not None:
        weights.fill(packed.model, place.device)  # type: ignore[arg-type]
    register_fsdp_forward_method(packed, "generate")
    register_fsdp_forward_method(packed, "hidden_states")
    register_fsdp_forward_method(packed, "logits")
    groups = [module for module in packed.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        """Every micro-batch ends in a reduce-scatter inside the replica, so that no rank ever holds whole gradients;
        replicas add theirs up after the last one only."""
        packed.set_requires_all_reduce(is_last)  # type: ignore[operator]  # fully_shard made it an FSDPModule
        yield

    def reshard() -> None:
        for group in groups:
            group.reshard()

    return live_engine("fsdp2", packed, packed, accumulate, make_optimizer, shards_parameters=True, reshard=reshard)


def data_mesh(place: Runtime, dp_replicate: int) -> DeviceMesh:
    """All ranks as (dp_shard), or as (dp_replicate, dp_shard) with neighbours in one shard group."""
    if dp_replicate == 1:
        return init_device_mesh(place.device.type, (place.world_size,), mesh_dim_names=("dp_shard",))
    sizes = (dp_replicate, place.world_size // dp_replicate)
    return init_device_mesh(place.device.type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))


def assert_sharded(engine: Engine, place: Runtime, dp_replicate: int) -> None:
    """Asking for FSDP must not silently give replicas, nor HSDP plain FSDP: every parameter is a DTensor on the mesh
    that was asked for, and this rank holds its rows of it and no more."""
    shards = place.world_size // dp_replicate
    placements: tuple[Placement, ...] = (Shard(0),) if dp_replicate == 1 else (Replicate(), Shard(0))
    for name, parameter in engine.model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise AssertionError(f"fsdp2 left {name} unsharded")
        found = (tuple(parameter.device_mesh.shape), tuple(parameter.placements))
        if found[0][-1] != shards or parameter.device_mesh.size() != place.world_size or found[1] != placements:
            raise AssertionError(f"fsdp2 put {name} on mesh {found}, not on {dp_replicate} x {shards}")
        if parameter.to_local().shape[0] > -(-parameter.shape[0] // shards):
            raise AssertionError(f"fsdp2 keeps {parameter.to_local().shape[0]} rows of {name} {tuple(parameter.shape)}")
