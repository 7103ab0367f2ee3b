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


ELASTIC_SUMS = "only FSDP2 lets the order of its sums be chosen"

REFUSED: tuple[Row, ...] = (
    Row(
        {"run.deterministic": ("elastic",), "parallel.strategy": ("ddp", *ZERO)},
        ELASTIC_SUMS,
        "set parallel.strategy=fsdp2",
    ),
    Row(
        {"run.deterministic": ("elastic",), "parallel.offload": ("optimizer", "params")},
        ELASTIC_SUMS,
        "set parallel.offload=none",
    ),
    Row(
        {"run.deterministic": ("elastic",), "parallel.sequence": (GIVEN,)},
        "a document's sums are cut where the processes cut it",
        "set parallel.sequence=1",
    ),
    Row(
        {"resilience.nonfinite": ("skip",), "parallel.strategy": ZERO},
        "DeepSpeed keeps what it has summed of a step that is not taken",
        "set parallel.strategy=fsdp2 or ddp",
    ),
    Row(
        {"resilience.audit_every": (GIVEN, 1), "parallel.sequence": (GIVEN,)},
        "processes that share a row compute different parts of it",
        "set parallel.sequence=1, or leave the audit out",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "data.packing": ("padded",)},
        "packed rows are cut among processes, and padding makes none",
        "set data.packing=best_fit, or parallel.sequence=1",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "tuning.method": ("prefix", "prompt")},
        "virtual tokens stand before each document of a whole row, and a process holds a slice of it",
        "set parallel.sequence=1, or tuning.method=lora",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "optim.neftune_alpha": (GIVEN,)},
        "the noise is drawn for whole rows, and would differ with the number of slices",
        "set parallel.sequence=1, or leave optim.neftune_alpha out",
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
