"""Combinations of recipe values that cannot work, as data: what is combined, why it fails, what to do instead.

Each row is checked when a recipe is read, and once more when `auto` has become a strategy, so nothing is loaded or
allocated before the refusal. `tests/unit/test_compatibility.py` asks for every row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_dist.config.schema import Recipe

GIVEN = "(given)"  # in `Row.when`: any value but null, false and 1
ZERO = ("zero1", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Row:
    """One impossible combination. `when`: dotted key -> values; it applies when every key has one of its values."""

    when: Mapping[str, tuple[Any, ...]]
    reason: str
    remedy: str
    upstream: str = ""  # the thread or page that tells of it; empty where it follows from the mathematics


_ALONE = "set parallel.sequence=1"
REFUSED: tuple[Row, ...] = (
    Row(
        {"parallel.sequence": (GIVEN,), "data.packing": ("padded",)},
        "packed rows are cut among processes, and padding makes none",
        f"set data.packing=best_fit, or {_ALONE.removeprefix('set ')}",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "tuning.method": ("prefix", "prompt")},
        "virtual tokens stand before each document of a whole row, and a process holds a slice of it",
        f"{_ALONE}, or take tuning.method=lora",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "optim.neftune_alpha": (GIVEN,)},
        "the noise is drawn for whole rows, and would differ with the number of slices",
        f"{_ALONE}, or leave optim.neftune_alpha out",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "run.deterministic": ("elastic",)},
        "slices add up the gradient of a weight in another order than whole rows",
        f"{_ALONE}, or run.deterministic=true",
    ),
)


def refusal(recipe: Recipe, strategy: str | None = None) -> str | None:
    """One line for the first row that `recipe` meets, or None. `strategy`: what `parallel.strategy: auto` became."""
    for row in REFUSED:
        values = {key: _value(recipe, key) for key in row.when}
        if strategy is not None and "parallel.strategy" in values:
            values["parallel.strategy"] = strategy
        if all(_matches(values[key], wanted) for key, wanted in row.when.items()):
            asked = " with ".join(f"{key}={value}" for key, value in values.items())
            thread = f" ({row.upstream})" if row.upstream else ""
            return f"{asked}: {row.reason}{thread}; {row.remedy}"
    return None


def _value(recipe: Recipe, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), recipe)


def _matches(value: Any, wanted: tuple[Any, ...]) -> bool:
    return value in wanted or (GIVEN in wanted and value not in (None, False, 1))
