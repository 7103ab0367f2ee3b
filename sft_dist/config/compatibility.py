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
    """One impossible combination: it applies when every key of `when` (dotted) has one of the values beside it."""

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
        {"run.deterministic": ("elastic",), "parallel.dp_replicate": (GIVEN,)},
        "sums over shards and over replicas are made one after the other",
        "set parallel.dp_replicate=1",
    ),
    Row(
        {"run.deterministic": ("elastic",), "precision.compile": (True,)},
        "a compiled layer may split its sums otherwise at every new shape",
        "set precision.compile=false",
    ),
    Row(
        {"parallel.dp_replicate": (GIVEN,), "parallel.strategy": ("ddp", *ZERO)},
        "replicas of shards are a mesh of fsdp2",
        "set parallel.strategy=fsdp2, or parallel.dp_replicate=1",
    ),
    Row(
        {"parallel.dp_replicate": (GIVEN,), "parallel.offload": ("optimizer", "params")},
        "replicas of shards are a mesh of fsdp2, which offloads nothing",
        "set parallel.offload=none, or parallel.dp_replicate=1",
    ),
    Row(
        {"memory.activation_offload": (True,), "memory.activation_checkpointing": ("none", "selective")},
        "what is offloaded are the layers' inputs, all that full checkpointing keeps",
        "set memory.activation_checkpointing=full or auto",
    ),
    Row(
        {"precision.compile": (True,), "memory.activation_checkpointing": ("selective",)},
        "a compiled layer decides itself what it keeps, selective checkpointing does so by operation",
        "set memory.activation_checkpointing=none or full, or precision.compile=false",
    ),
    Row(
        {"precision.compile": (True,), "parallel.strategy": ("zero3",)},
        "zero3 gathers the matrices of a layer one by one inside what would be compiled as one",
        "set parallel.strategy=fsdp2, or precision.compile=false",
    ),
    Row(
        {"resilience.audit_every": (GIVEN, 1), "parallel.sequence": (GIVEN,)},
        "processes that share a row compute different parts of it",
        "set parallel.sequence=1, or leave the audit out",
    ),
    Row(
        {"run.deterministic": ("elastic",), "optim.name": ("adamw8bit", "adafactor", "muon")},
        "its sums over a tensor follow the shards",
        "set optim.name=adamw",
    ),
    Row(
        {"run.deterministic": ("elastic",), "precision.stochastic_rounding": (True,)},
        "the random bits follow the shards",
        "set precision.stochastic_rounding=false",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "precision.compile": (True,)},
        "a layer that exchanges tokens for heads is no single graph",
        "set parallel.sequence=1, or precision.compile=false",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "tuning.method": ("prefix", "prompt")},
        "virtual tokens stand before every document, and a slice may begin inside one",
        "set parallel.sequence=1, or use tuning.method=lora",
    ),
    Row(
        {"parallel.sequence": (GIVEN,), "optim.neftune_alpha": (GIVEN, 1)},
        "noise is drawn for whole rows, and no process holds one",
        "set parallel.sequence=1, or leave the noise out",
    ),
    Row(
        {"optim.name": ("muon",), "parallel.strategy": ZERO},
        "ZeRO moves flat pieces of all parameters, and Muon orthogonalises whole matrices",
        "use parallel.strategy=fsdp2, or optim.name=adamw",
        "deepspeedai/DeepSpeed#7509",
    ),
    Row(
        {"optim.name": ("adafactor",), "parallel.strategy": ZERO},
        "ZeRO moves flat pieces of all parameters, and Adafactor sums over rows and columns",
        "use parallel.strategy=fsdp2, or optim.name=adamw",
        "deepspeedai/DeepSpeed#2152",
    ),
    Row(
        {"optim.name": ("adamw8bit",), "parallel.strategy": ZERO},
        "ZeRO moves flat pieces of all parameters, and the 8-bit blocks lie along their rows",
        "use parallel.strategy=fsdp2, or parallel.offload=optimizer with optim.name=adamw",
    ),
    Row(
        {"precision.stochastic_rounding": (True,), "parallel.strategy": ZERO},
        "ZeRO keeps float32 masters, so there is nothing to round",
        "use parallel.strategy=fsdp2, or leave it out",
    ),
    Row(
        {"precision.stochastic_rounding": (True,), "optim.name": ("adamw8bit", "adafactor", "muon")},
        "only AdamW's update is rounded stochastically",
        "use optim.name=adamw",
    ),
    Row(
        {"optim.lora_plus_ratio": (GIVEN,), "tuning.method": ("full", "prefix", "prompt", "bitfit")},
        "LoRA+ is about LoRA's two matrices and this method has none",
        "leave it out, or use tuning.method=lora",
    ),
    Row(
        {"tuning.method": ("dora",), "parallel.strategy": ("zero3",)},
        "PEFT's DoRA reads the shape of a matrix that ZeRO-3 has given back, in every forward outside a training step",
        "use parallel.strategy=fsdp2 or zero2",
    ),
    Row(
        {"tuning.method": ("prefix",), "data.packing": ("padded",)},
        "padded rows go through the architecture's own attention, which has no place for a prefix",
        "use data.packing=best_fit, or tuning.method=prompt",
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
