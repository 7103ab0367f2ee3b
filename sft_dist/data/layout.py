"""How an order of examples becomes packs, and packs become a step: one window at a time, nothing of the data's size.

    PlanSpec + lengths + (epoch, window) -> the window's examples -> packs -> shuffled packs
    PlanSpec + packs + numbers of their examples -> StepPlan

A window is a run of 131,072 examples of the shuffled order (or, where a step is a number of examples, that number).
Windows bound the work of a seek and keep the mixing random: packing a whole data set at once would marry the same
long and short documents in every epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sft_dist.data.packing import PACKINGS, Packs, count_best_fit
from sft_dist.data.permutation import derive_key, permute
from sft_dist.types import Pack, StepPlan

WINDOW_EXAMPLES = 131_072
LENGTH_GROUP_MICRO_BATCHES = 64  # `padded` sorts this many micro-batches' worth of documents by length: close to no
# padding, while a document still meets new company in each epoch
TOKEN_COST = 1.0
SQUARED_TOKEN_COST = 1 / 24_576  # 12 x width for width 2048, from the FLOP counts 24 * width**2 per token and layer
# against 2 * width * l for causal attention: at 24,576 tokens a document's attention weighs as much as the rest


@dataclass(frozen=True)
class PlanSpec:
    """Everything but the data that decides a plan. Counts are per step over all ranks."""

    seq_len: int
    packing: str
    packs_per_micro_batch: int
    micro_batches_per_step: int | None
    examples_per_step: int | None
    seed: int
    epochs: int
    max_steps: int | None
    shuffle: bool
    store_fingerprint: str
    token_cost: float = TOKEN_COST
    squared_token_cost: float = SQUARED_TOKEN_COST
    window_examples: int = WINDOW_EXAMPLES

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} is none of {sorted(PACKINGS)}")
        if (self.micro_batches_per_step is None) == (self.examples_per_step is None):
            raise ValueError("give either micro_batches_per_step or examples_per_step")

    @property
    def packs_per_step(self) -> int | None:
        """Packs of a full step; None where a step is a number of examples."""
        return self.micro_batches_per_step and self.micro_batches_per_step * self.packs_per_micro_batch

    @property
    def window(self) -> int:
        """Examples that are packed together; no pack reaches across."""
        return self.examples_per_step or self.window_examples


class ExampleNumbers(NamedTuple):
    """What planning needs to know about N examples. Any number types, mapped files too: never copied whole."""

    lengths: np.ndarray
    num_loss_tokens: np.ndarray
    loss_weight_sums: np.ndarray

    def at(self, rows: np.ndarray | slice) -> ExampleNumbers:
        return ExampleNumbers(*(column[rows] for column in self))


def num_windows(spec: PlanSpec, num_examples: int) -> int:
    return -(-num_examples // spec.window)


def examples_in_order(spec: PlanSpec, num_examples: int, epoch: int, first: int, last: int) -> np.ndarray:
    """The examples at places first..last-1 (or the end) of an epoch's order, int64."""
    order = np.arange(first, min(last, num_examples))
    return permute(order, num_examples, derive_key("examples", spec.seed, epoch)) if spec.shuffle else order


def pack_window(spec: PlanSpec, lengths: np.ndarray, epoch: int, number: int) -> Packs:
    """The packs of one window, shuffled; members are rows of `lengths`."""
    members = examples_in_order(spec, len(lengths), epoch, number * spec.window, (number + 1) * spec.window)
    packs = pack_examples(spec, lengths[members], derive_key("packs", spec.seed, epoch, number))
    return Packs(members[packs.members], packs.offsets)


def pack_examples(spec: PlanSpec, lengths: np.ndarray, key: int) -> Packs:
    """Packs of a window's documents, shuffled by `key`; under `padded` whole micro-batches of like length are."""
    if spec.packing != "padded":
        packs = PACKINGS[spec.packing](lengths, spec.seq_len)
        return packs.take(permute(np.arange(len(packs)), len(packs), key)) if spec.shuffle else packs
    rows = spec.packs_per_micro_batch
    group = rows * LENGTH_GROUP_MICRO_BATCHES
    groups = (lengths[at : at + group] for at in range(0, len(lengths), group))
    members = [PACKINGS["padded"](some, spec.seq_len).members + at * group for at, some in enumerate(groups)]
    packs = Packs(np.concatenate(members), np.arange(len(lengths) + 1))
    if not spec.shuffle:
        return packs
    num_batches = -(-len(lengths) // rows)
    batches = permute(np.arange(num_batches), num_batches, key)
    order = (batches[:, None] * rows + np.arange(rows)).ravel()
    return packs.take(order[order < len(lengths)])


def count_packs(spec: PlanSpec, lengths: np.ndarray, epoch: int) -> np.ndarray:
    """Packs of each window of an epoch, int64[num_windows]: one pass over the shuffled order, 30 ns per example."""
    starts = np.arange(0, len(lengths), spec.window)
    if spec.packing != "best_fit":
        return np.diff(starts, append=len(lengths))
    stride = spec.window * max(1, WINDOW_EXAMPLES // spec.window)  # many small windows are counted in one call
    counts = []
    for first in range(0, len(lengths), stride):
        members = examples_in_order(spec, len(lengths), epoch, first, first + stride)
        counts.append(count_best_fit(lengths[members], spec.window, spec.seq_len))
    return np.concatenate(counts)


def pack_costs(spec: PlanSpec, packs: Packs, lengths: np.ndarray) -> np.ndarray:
    """What each pack costs to train on, float64[P], in units of a token. `lengths`: of the packs' members."""
    lengths = lengths.astype(np.int64)
    tokens, squares = (np.add.reduceat(values, packs.offsets[:-1]) for values in (lengths, lengths * lengths))
    return spec.token_cost * tokens + spec.squared_token_cost * squares


def lay_out_step(spec: PlanSpec, packs: Packs, numbers: ExampleNumbers, step: int, epoch: int) -> StepPlan:
    """The packs of a step sorted by falling cost and cut into micro-batches. `numbers`: of the packs' members."""
    costs = pack_costs(spec, packs, numbers.lengths)
    examples, offsets = packs.members.tolist(), packs.offsets.tolist()
    tokens, loss_tokens = (
        np.add.reduceat(column.astype(np.int64), packs.offsets[:-1]).tolist() for column in numbers[:2]
    )
    weights = numbers.loss_weight_sums.astype(np.float64).tolist()
    made = [
        Pack(
            example_ids=tuple(examples[start:end]),
            num_tokens=tokens[number],
            num_loss_tokens=loss_tokens[number],
            loss_weight_sum=math.fsum(weights[start:end]),  # exact, so the same however a machine adds
            cost=cost,
        )
        for number, ((start, end), cost) in enumerate(zip(pairwise(offsets), costs.tolist(), strict=True))
    ]
    ranked = [made[number] for number in np.argsort(-costs, kind="stable")]  # ties keep the shuffled order
    size = spec.packs_per_micro_batch
    micro_batches = tuple(tuple(ranked[at : at + size]) for at in range(0, len(ranked), size))
    return StepPlan(step=step, epoch=epoch, micro_batches=micro_batches)
