"""What a run works through: the prepared data where they are in the cache, else the recipe's word and upper bounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.config.auto import AIM_STEPS, MAX_AUTO_STEP_TOKENS, Choices
from sft_dist.config.schema import Recipe
from sft_dist.data.cache import cache_root
from sft_dist.data.planning import train_plan

COLUMNS = ("lengths", "num_loss_tokens", "loss_weight_sums")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The training split of a cache entry."""

    folder: Path
    lengths: np.ndarray
    num_loss_tokens: np.ndarray
    loss_weight_sums: np.ndarray
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Workload:
    """Per optimizer step, over all ranks. Steps are None while nobody knows them."""

    num_steps: int | None
    step_tokens: int
    mean_length: float  # sum of squared document lengths over tokens: what attention costs per token
    supervised: float  # share of tokens in the loss
    note: str


def find_prepared(recipe: Recipe) -> Prepared | None:
    """The newest cache entry made from the recipe's sources and sequence length; the tokenizer is not compared."""
    wanted = _wanted(recipe)
    reports = sorted(cache_root(recipe).glob("*/report.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for report in reports:
        train = report.parent / "train"
        if _made_from(report) == wanted and all((train / f"{name}.npy").is_file() for name in COLUMNS):
            columns = {name: np.load(train / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
            fingerprint = json.loads((train / "meta.json").read_text())["fingerprint"]
            return Prepared(report.parent, **columns, fingerprint=fingerprint)
    return None


def workload(recipe: Recipe, choices: Choices, prepared: Prepared | None) -> Workload:
    """From the plan that the run would follow; without data, documents as long as a pack and all tokens supervised."""
    if prepared is not None:
        plan = train_plan(recipe, choices, prepared)
        lengths = prepared.lengths.astype(np.float64)
        supervised = prepared.num_loss_tokens.sum(dtype=np.int64) / prepared.num_tokens
        epochs = plan.num_steps / plan.steps_per_epoch
        return Workload(
            num_steps=plan.num_steps,
            step_tokens=round(epochs * prepared.num_tokens / plan.num_steps),
            mean_length=float((lengths**2).sum() / lengths.sum()),
            supervised=float(supervised),
            note=f"{len(lengths):,} examples prepared in {prepared.folder}",
        )
    slots = choices.packs_per_micro_batch * recipe.data.seq_len * (choices.micro_batches_per_step or 1)
    return Workload(
        num_steps=recipe.optim.max_steps,
        step_tokens=slots,
        mean_length=float(recipe.data.seq_len),
        supervised=1.0,
        note="not prepared (sft-dist data prepare): documents as long as a pack and all tokens supervised are assumed",
    )


def unknown_tokens() -> int:
    """Stands for the size of data nobody has counted: large, so that `auto` takes its largest step."""
    return AIM_STEPS * MAX_AUTO_STEP_TOKENS


def _wanted(recipe: Recipe) -> dict[str, Any]:
    roles = ("sources", "eval_sources", "test_sources")
    sources = [[role, s.path, s.weight] for role in roles for s in getattr(recipe.data, role)]
    return {"sources": sources, "seq_len": recipe.data.seq_len}


def _made_from(report: Path) -> dict[str, Any]:
    """The same facts of a cache entry; nothing of one that cannot be read."""
    try:
        values = json.loads(report.read_text())
        sources = [[s["role"], s["path"], s["weight"]] for s in values["sources"]]
        return {"sources": sources, "seq_len": values["seq_len"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
