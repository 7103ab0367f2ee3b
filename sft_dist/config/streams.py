"""What a recipe may not ask of streamed sources: nobody knows their rows before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft_dist.config.schema import Recipe


def check_streams(recipe: Recipe) -> None:
    """Raise ValueError, with the remedy, where a recipe asks for what needs a streamed source to be counted first."""
    data = recipe.data
    for role in ("eval_sources", "test_sources"):
        for number, source in enumerate(getattr(data, role)):
            if source.streaming:
                raise ValueError(f"data.{role}.{number}.streaming=true: only data.sources are streamed; leave it out")
    if not data.streams:
        return
    whole = [n for n, source in enumerate(data.sources) if not source.streaming]
    if whole:
        raise ValueError(f"data.sources.{whole[0]} is not streamed but others are: set streaming=true for all, or none")
    repeated = [f"data.sources.{n}.repeat" for n, source in enumerate(data.sources) if source.repeat]
    asked = {
        "data.eval_fraction": (data.eval_fraction, "set it to 0 and name data.eval_sources"),
        "data.test_fraction": (data.test_fraction, "set it to 0 and name data.test_sources"),
        "data.mixture_temperature": (data.mixture_temperature != 1.0, "give the sources a weight"),
        "data.near_duplicates": (data.near_duplicates != "ignore", "set it to ignore"),
        "data.filters.min_answer_tokens": (data.filters.min_answer_tokens, "leave it out"),
        "data.filters.max_repetition": (data.filters.max_repetition != 1.0, "leave it out"),
        "data.filters.drop_refusals": (data.filters.drop_refusals, "leave it out"),
        **dict.fromkeys(repeated, (True, "give the sources a weight")),
    }
    for key, (is_set, remedy) in asked.items():
        if is_set:
            raise ValueError(f"{key} needs all rows at once, and data.sources are streamed: {remedy}")
    if recipe.optim.max_steps is None:
        raise ValueError("optim.max_steps is missing: nobody knows how long streamed data.sources are")
    if recipe.batch.tokens_per_step == "auto" and recipe.batch.examples_per_step is None:
        raise ValueError(
            "batch.tokens_per_step=auto depends on the size of the data, and data.sources are streamed: set it, or "
            "batch.examples_per_step"
        )
