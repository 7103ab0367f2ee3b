"""What `run.deterministic: elastic` asks of a run: numbers that no number of processes may change. Imports no torch."""

from __future__ import annotations

from sft_dist.errors import ConfigError

ELASTIC = "elastic"
NOMINAL_RANKS = 8  # what `auto` sizes a batch for, so that it does not depend on how many processes start


def check_world(world_size: int) -> None:
    """Raise ConfigError unless `world_size` is a power of two: sums over ranks are subtrees of one binary tree then."""
    if world_size & (world_size - 1):
        raise ConfigError(
            f"run.deterministic=elastic on {world_size} processes: needs a power of two (1, 2, 4, 8 ...); "
            "change --nproc, or set run.deterministic=true"
        )


def check_micro_batches(world_size: int, micro_batches_per_step: int | None) -> None:
    """Raise ConfigError unless every process gets as many micro-batches of a full step.

    Steps that are a number of examples (None) vary in length: their last round is filled, which changes no bit.
    """
    if micro_batches_per_step is not None and micro_batches_per_step % world_size:
        raise ConfigError(
            f"run.deterministic=elastic: {world_size} processes do not divide the {micro_batches_per_step} "
            "micro-batches of a step; change --nproc or batch.tokens_per_step"
        )
