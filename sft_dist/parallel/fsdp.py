"""FSDP2: parameters, gradients and optimizer state sharded over all ranks with `fully_shard`, one group per layer.

The same code on CPU (gloo) and GPU (nccl). Gradients are summed, not averaged: gloo has no scaled sum, and the loop
already divides by the global token count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sft_dist.parallel.engine import Engine, MakeOptimizer, live_engine
from sft_dist.parallel.runtime import Runtime


def build_fsdp(
    packed: nn.Module,
    layers: Sequence[nn.Module],
    place: Runtime,
    compute_dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """Shard `packed` in place, each of `layers` as a group of its own.

    Parameters keep their dtype, forward and backward run in `compute_dtype`, gradient sums in fp32.
    """
    mesh = init_device_mesh(place.device.type, (place.world_size,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(packed, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(packed, "generate")
    register_fsdp_forward_method(packed, "hidden_states")
    register_fsdp_forward_method(packed, "logits")
    groups = [module for module in packed.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        packed.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # fully_shard made it an FSDPModule
        yield

    def reshard() -> None:
        for group in groups:
            group.reshard()

    return live_engine("fsdp2", packed, packed, accumulate, make_optimizer, shards_parameters=True, reshard=reshard)


def assert_sharded(engine: Engine) -> None:
    """Asking for FSDP must not silently give replicas: every parameter has to be a DTensor over all ranks."""
    plain = [name for name, parameter in engine.model.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        raise AssertionError(f"fsdp2 left {len(plain)} parameters unsharded, first {plain[0]}")
