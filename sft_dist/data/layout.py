"""One epoch of a plan as three flat arrays: which examples, cut into packs, cut into steps.

    PlanSpec + lengths + epoch -> order -> windows of 131,072 -> packs -> shuffled packs -> EpochLayout

Windows bound the work of a seek and keep the mixing random: packing a whole data set at once would marry the same
long and short documents in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft_dist.data.packing import PACKINGS
from sft_dist.data.permutation import derive_key, permute

WINDOW_EXAMPLES = 131_072
LENGTH_GROUP_MICRO_BATCHES = 64  # `padded` sorts this many micro-batches' worth of documents by length: close to no
# padding, while a document still meets new company in each epoch


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

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} is none of {sorted(PACKINGS)}")
        if (self.micro_batches_per_step is None) == (self.examples_per_step is None):
            raise ValueError("give either micro_batches_per_step or examples_per_step")

    @property
    def packs_per_step(self) -> int | None:
        """Packs of a full step; None where a step is a number of examples."""
        return self.micro_batches_per_step and self.micro_batches_per_step * self.packs_per_micro_batch


@dataclass(frozen=True)
class EpochLayout:
    """One epoch as flat arrays: pack p is `examples[pack_offsets[p]:pack_offsets[p + 1]]`, steps cut packs likewise."""

    examples: np.ndarray  # int64[N]
    pack_offsets: np.ndarray  # int64[num_packs + 1], into examples
    step_offsets: np.ndarray  # int64[num_steps + 1], into packs

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1


def lay_out_epoch(spec: PlanSpec, lengths: np.ndarray, epoch: int) -> EpochLayout:
    """Order, pack and cut one epoch. `lengths`: int64[N]."""
    order = np.arange(len(lengths))
    if spec.shuffle:
        order = permute(order, len(lengths), derive_key("examples", spec.seed, epoch))
    if spec.examples_per_step:
        return _steps_of_examples(spec, lengths, order)
    packs: list[np.ndarray] = []
    for number, start in enumerate(range(0, len(order), WINDOW_EXAMPLES)):
        window = order[start : start + WINDOW_EXAMPLES]
        packs += _pack_window(spec, lengths, window, derive_key("packs", spec.seed, epoch, number))
    num_packs = len(packs)
    return _layout_of(packs, [*range(0, num_packs, spec.packs_per_step or num_packs), num_packs])


def _steps_of_examples(spec: PlanSpec, lengths: np.ndarray, order: np.ndarray) -> EpochLayout:
    """Each run of `examples_per_step` examples packed on its own, so that no step borrows from its neighbour."""
    packs: list[np.ndarray] = []
    step_offsets = [0]
    for start in range(0, len(order), spec.examples_per_step or len(order)):
        members = order[start : start + (spec.examples_per_step or len(order))]
        packs += [members[pack] for pack in PACKINGS[spec.packing](lengths[members], spec.seq_len)]
        step_offsets.append(len(packs))
    return _layout_of(packs, step_offsets)


def _pack_window(spec: PlanSpec, lengths: np.ndarray, window: np.ndarray, key: int) -> list[np.ndarray]:
    """The packs of one window, shuffled; under `padded` whole micro-batches of like length are shuffled."""
    unit = spec.packs_per_micro_batch if spec.packing == "padded" else 1
    group = unit * LENGTH_GROUP_MICRO_BATCHES if spec.packing == "padded" else len(window)
    packs: list[np.ndarray] = []
    for start in range(0, len(window), group):
        members = window[start : start + group]
        packs += [members[pack] for pack in PACKINGS[spec.packing](lengths[members], spec.seq_len)]
    if not spec.shuffle:
        return packs
    units = [packs[at : at + unit] for at in range(0, len(packs), unit)]
    return [pack for at in permute(np.arange(len(units)), len(units), key).tolist() for pack in units[at]]


def _layout_of(packs: list[np.ndarray], step_offsets: list[int]) -> EpochLayout:
    sizes = np.fromiter((len(pack) for pack in packs), dtype=np.int64, count=len(packs))
    return EpochLayout(
        examples=np.concatenate(packs),
        pack_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        step_offsets=np.array(step_offsets, dtype=np.int64),
    )
