"""Which keys define the numbers of a run, and the refusal to resume when one of them changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_dist.config.schema import Recipe
from sft_dist.errors import CheckpointError, ConfigError

# May change at a resume: names, cadence, what is shown, when to stop, where it runs.
FREE_KEYS = (
    "run.name",
    "run.dir",
    "optim.stop_after_step",
    "data.cache_dir",
    "data.workers",
    "checkpoint.",
    "eval.",
    "log.",
    "hub.",
    "resilience.",
    "cluster.",
    "kernels.",
    "parallel.",
)
# `parallel.` and `kernels.` change the order of sums, not what is computed.


def identity(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value for every key that defines the numbers."""
    flat = flatten(recipe.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not key.startswith(FREE_KEYS)}


def refuse_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], run_dir: str, explained: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError naming the first identity key whose value differs from the run's, causes before effects.

    `explained` tells of keys that stand in no recipe what they are made from.
    """
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = old.get(key, "absent"), new.get(key, "absent")
        if before != now:
            what = f" ({explained[key]})" if explained and key in explained else ""
            raise ConfigError(
                f"{key}{what}={now} but the run in {run_dir} was started with {before}; "
                f"a resume keeps what defines the numbers: restore it, or choose another run.dir"
            )


def check_recipe(recipe: Recipe) -> None:
    """Refuse, before anything is written, a recipe that differs from the one that started the run in `run.dir`."""
    recorded = read_fingerprint(recipe.run.dir)
    if recorded is not None:
        refuse_changes(recorded["recipe"], identity(recipe), recipe.run.dir)


def read_fingerprint(run_dir: str | Path) -> dict[str, Any] | None:
    """The record of the run in `run_dir`, None when it is new; raises CheckpointError when it is damaged."""
    path = Path(run_dir) / "fingerprint.json"
    try:
        record = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: altered ({error}); restore it from a copy, or choose another run.dir"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise CheckpointError(f"{path}: altered (it has no recipe); restore it from a copy, or choose another run.dir")
    return record


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; lists by index."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and tree:
        items = ((str(index), value) for index, value in enumerate(tree))  # type: ignore[assignment]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
