"""Choose and build the engine, then prove that it is the one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sft_dist.parallel.ddp import assert_replicated, build_ddp
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.fsdp import assert_sharded, build_fsdp
from sft_dist.parallel.runtime import Runtime


def build_engine(
    strategy: str, packed: nn.Module, layers: Sequence[nn.Module], place: Runtime, compute_dtype: torch.dtype
) -> Engine:
    """`strategy` is ddp or fsdp2. The model must sit on the CPU or the device with equal weights on every rank."""
    if strategy == "fsdp2":
        engine = build_fsdp(packed, layers, place.world_size, place.device, compute_dtype)
        assert_sharded(engine)
        return engine
    packed.to(place.device)
    engine = build_ddp(packed, place.world_size)
    assert_replicated(engine)
    return engine
