"""The plans of a recipe: what is trained, and one pass over what is held out. No torch, no model, no process group."""

from __future__ import annotations

from typing import Any, Protocol, overload

import numpy as np

from sft_dist.config.auto import Choices
from sft_dist.config.schema import Recipe
from sft_dist.data.layout import PlanSpec
from sft_dist.data.plan import PackPlan, build_plan, eval_plan
from sft_dist.data.stream_plan import WINDOW_EXAMPLES, Stream, StreamPlan


class Counted(Protocol):
    """What a plan reads of a split; a `TokenStore` has it. Arrays are [N], one number per example."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def num_loss_tokens(self) -> np.ndarray: ...

    @property
    def loss_weight_sums(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> str: ...


@overload
def train_plan(recipe: Recipe, choices: Choices, split: Counted) -> PackPlan: ...
@overload
def train_plan(recipe: Recipe, choices: Choices, split: Stream) -> StreamPlan: ...
def train_plan(recipe: Recipe, choices: Choices, split: Any) -> PackPlan | StreamPlan:
    """The run's plan: a pure function of data, recipe and choices. Streams are planned as they are read."""
    if recipe.data.streams:
        return StreamPlan(_stream_spec(recipe, choices, split), split)
    return build_plan(
        lengths=split.lengths,
        num_loss_tokens=split.num_loss_tokens,
        loss_weight_sums=split.loss_weight_sums,
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        packs_per_micro_batch=choices.packs_per_micro_batch,
        micro_batches_per_step=choices.micro_batches_per_step,
        examples_per_step=recipe.batch.examples_per_step,
        seed=recipe.run.seed,
        epochs=recipe.optim.epochs,
        max_steps=recipe.optim.max_steps,
        store_fingerprint=split.fingerprint,
    )


def _stream_spec(recipe: Recipe, choices: Choices, stream: Stream) -> PlanSpec:
    return PlanSpec(
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        packs_per_micro_batch=choices.packs_per_micro_batch,
        micro_batches_per_step=choices.micro_batches_per_step,
        examples_per_step=recipe.batch.examples_per_step,
        seed=recipe.run.seed,
        epochs=1,
        max_steps=recipe.optim.max_steps,
        shuffle=True,
        store_fingerprint=stream.fingerprint,
        window_examples=WINDOW_EXAMPLES,
    )


def heldout_plan(recipe: Recipe, choices: Choices, split: Counted) -> PackPlan:
    """One pass over a held-out split, packed like training."""
    return eval_plan(
        lengths=split.lengths,
        num_loss_tokens=split.num_loss_tokens,
        loss_weight_sums=split.loss_weight_sums,
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        packs_per_micro_batch=choices.packs_per_micro_batch,
        store_fingerprint=split.fingerprint,
    )
