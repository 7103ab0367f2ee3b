"""Choose and build the engine, then prove that it is the one that was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from sft_dist.parallel.ddp import assert_replicated, build_ddp
from sft_dist.parallel.engine import Engine, MakeOptimizer, StoredWeights
from sft_dist.parallel.exact import with_exact_sums
from sft_dist.parallel.fsdp import assert_sharded, build_fsdp
from sft_dist.parallel.runtime import Runtime

SHARD_BY_SHARD = ("fsdp2", "zero3")  # share every weight, so no rank has to hold them all before
CASTS_ITSELF = ("fsdp2", "zero3")  # hold gathered parameters in the compute dtype; the others compute under autocast


def build_engine(
    strategy: str,
    packed: nn.Module,
    layers: Sequence[nn.Module],
    place: Runtime,
    compute_dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
    *,
    offload: str = "none",
    exact: bool = False,
    dp_replicate: int = 1,
    weights: StoredWeights | None = None,
) -> Engine:
    """`strategy` is ddp, fsdp2, zero1, zero2 or zero3. The model must sit on the CPU or the device, with equal weights
    on every rank. `make_optimizer` is called with the trained parameters and leaves the moments to the engine.

    For fsdp2: with `exact` the bits of every sum are those of any number of ranks; `dp_replicate` replicas of the
    sharded model, which divides the number of ranks. For the engines of SHARD_BY_SHARD: `weights` has the values of a
    model without memory."""
    if strategy.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = place.device.type  # DeepSpeed decides about its devices while it is imported
        os.environ["LOCAL_RANK"] = str(place.device.index or 0)  # and from here takes the number of its own
        os.environ["LOCAL_SIZE"] = str(place.local_world_size)  # else on CPUs it starts numactl with each reduction
        from sft_dist.parallel.zero import build_zero

        return build_zero(int(strategy[-1]), packed, place, compute_dtype, make_optimizer, offload, weights)
    if strategy == "fsdp2":
        engine = build_fsdp(packed, layers, place, compute_dtype, make_optimizer, dp_replicate, weights)
        assert_sharded(engine, place, dp_replicate)
        return with_exact_sums(engine) if exact else engine
    assert strategy == "ddp", strategy
    packed.to(place.device)
    engine = build_ddp(packed, place.world_size, make_optimizer)
    assert_replicated(engine)
    return engine
