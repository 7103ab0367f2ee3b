"""What a recipe means for a number of processes, before any of them is started."""

from __future__ import annotations

from sft_dist.config.auto import refuse_uneven
from sft_dist.config.schema import Recipe


def describe_world(recipe: Recipe, world_size: int) -> str | None:
    """How `world_size` ranks share a step, as far as the recipe fixes it; None where batch sizes are `auto`.

    Ranks that do not divide the micro-batches are filled up with empty ones: allowed, told, and paid for. Raises
    ConfigError where the ranks cannot form the groups that the recipe asks for.
    """
    refuse_uneven(recipe, world_size)
    world_size //= recipe.parallel.sequence  # ranks of a group work on one micro-batch
    micro, step = recipe.batch.tokens_per_micro_batch, recipe.batch.tokens_per_step
    if micro == "auto" or step == "auto":
        return None
    num = step // micro
    rounds = -(-num // world_size)
    idle = rounds * world_size - num
    who = "rank(s)" if recipe.parallel.sequence == 1 else f"group(s) of {recipe.parallel.sequence} ranks"
    share = f"{world_size} {who} share {num} micro-batches of {micro:,} tokens in {rounds} round(s)"
    return share if not idle else f"{share}, {idle} of {rounds * world_size} places stay empty"
