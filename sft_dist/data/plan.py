"""What every optimizer step trains on, as a pure function that never sees world size, workers, devices or time.

    lengths, seed, epoch -> shuffled order -> windows -> packs -> shuffled packs -> steps -> micro-batches by cost

    plan = build_plan(lengths=..., seq_len=2048, packs_per_micro_batch=4, micro_batches_per_step=8, seed=0, ...)
    plan.step(17)      # any step at any time: nothing to replay, so resuming needs one integer
    plan.digest        # two plans with equal digests train on the same tokens in the same order

`data.layout` says how an epoch becomes packs and steps. Inside a step, packs are sorted by cost, so that the
micro-batches the ranks work on at the same time cost about the same: for groups of a fixed size this minimises the sum
over rounds of the slowest rank's cost.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise

import numpy as np

from sft_dist.data.layout import WINDOW_EXAMPLES, EpochLayout, PlanSpec, lay_out_epoch
from sft_dist.errors import DataError
from sft_dist.types import Pack, StepPlan

TOKENS_WHERE_ATTENTION_WEIGHS_AS_MUCH = 24_576  # cost = l + l**2 / this; 12 x width for width 2048, from the FLOP
# counts 24 * width**2 per token and layer against 2 * width * l for causal attention


def build_plan(
    *,
    lengths: np.ndarray,
    num_loss_tokens: np.ndarray,
    loss_weight_sums: np.ndarray,
    seq_len: int,
    packing: str,
    packs_per_micro_batch: int,
    micro_batches_per_step: int | None,
    examples_per_step: int | None,
    seed: int,
    epochs: int,
    max_steps: int | None,
    store_fingerprint: str,
    shuffle: bool = True,
) -> PackPlan:
    """Plan a training run.

    `lengths`, `num_loss_tokens`, `loss_weight_sums`: [N] per example, as a `TokenStore` holds them. A step is either
    `micro_batches_per_step` micro-batches of `packs_per_micro_batch` packs, or the packs of `examples_per_step`
    consecutive shuffled examples. `max_steps` overrides `epochs` and runs on over further epochs.
    Raises DataError when there is nothing to train on, or an example without a supervised token.
    """
    spec = PlanSpec(
        seq_len=seq_len,
        packing=packing,
        packs_per_micro_batch=packs_per_micro_batch,
        micro_batches_per_step=micro_batches_per_step,
        examples_per_step=examples_per_step,
        seed=seed,
        epochs=epochs,
        max_steps=max_steps,
        shuffle=shuffle,
        store_fingerprint=store_fingerprint,
    )
    return PackPlan(spec, lengths, num_loss_tokens, loss_weight_sums)


def eval_plan(
    *,
    lengths: np.ndarray,
    num_loss_tokens: np.ndarray,
    loss_weight_sums: np.ndarray,
    seq_len: int,
    packing: str,
    packs_per_micro_batch: int,
    store_fingerprint: str,
    micro_batches_per_step: int = 16,
) -> PackPlan:
    """Plan one pass over a held-out set in its own order; a "step" is only what is loaded at once."""
    return build_plan(
        lengths=lengths,
        num_loss_tokens=num_loss_tokens,
        loss_weight_sums=loss_weight_sums,
        seq_len=seq_len,
        packing=packing,
        packs_per_micro_batch=packs_per_micro_batch,
        micro_batches_per_step=micro_batches_per_step,
        examples_per_step=None,
        seed=0,
        epochs=1,
        max_steps=None,
        store_fingerprint=store_fingerprint,
        shuffle=False,
    )


class PackPlan:
    """Steps 1..num_steps, each computed when asked for. The two epochs touched last are kept."""

    def __init__(
        self, spec: PlanSpec, lengths: np.ndarray, num_loss_tokens: np.ndarray, loss_weight_sums: np.ndarray
    ) -> None:
        self.spec = spec
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._num_loss_tokens = np.asarray(num_loss_tokens, dtype=np.int64)
        self._loss_weight_sums = np.asarray(loss_weight_sums, dtype=np.float64)
        self._check_examples()
        self._lock = threading.RLock()  # the loader's thread and the training loop may ask at the same time
        self._layouts: dict[int, EpochLayout] = {}
        self._epoch_starts = [0]  # steps before each epoch, as far as it has been needed
        self.num_steps: int = spec.max_steps or self._steps_before(spec.epochs)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[StepPlan]:
        return (self.step(number) for number in range(1, self.num_steps + 1))

    def step(self, n: int) -> StepPlan:
        """Step `n` (1-based, up to `num_steps`). The last step of an epoch may hold fewer micro-batches."""
        if not 1 <= n <= self.num_steps:
            raise IndexError(f"step {n} is outside 1..{self.num_steps}")
        return self._step(n)

    @property
    def num_examples(self) -> int:
        return len(self._lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch. Later ones may differ by a step when the data fills several windows."""
        return self._steps_before(1)

    @property
    def num_packs(self) -> int:
        """Packs of the first epoch."""
        return self._layout(0).num_packs

    @cached_property
    def efficiency(self) -> float:
        """Real tokens over token slots in the first epoch, before rounding up to a multiple.

        `best_fit`: a slot is a token of a pack's capacity. `padded`: a position of the [B, S] rectangle. `none`: 1.0.
        """
        num_tokens = int(self._lengths.sum())
        slots = {"best_fit": self._capacity_slots, "padded": self._rectangle_slots, "none": lambda: num_tokens}
        return num_tokens / slots[self.spec.packing]()

    def balance(self, world_size: int) -> float:
        """Mean over slowest rank's cost, summed over the rounds of the first epoch; 1.0 when nobody ever waits."""
        total, waited_for = 0.0, 0.0
        for step in self._first_epoch():
            costs = [sum(pack.cost for pack in micro_batch) for micro_batch in step.micro_batches]
            total += math.fsum(costs)
            waited_for += math.fsum(max(costs[at : at + world_size]) for at in range(0, len(costs), world_size))
        return total / (waited_for * world_size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the settings, the examples' numbers and the whole first epoch as laid out.

        The layout is part of it so that a change of the packing code shows, even where no setting changed.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        layout = self._layout(0)
        for array in (self._lengths, self._num_loss_tokens, layout.examples, layout.pack_offsets, layout.step_offsets):
            digest.update(array.astype("<i8").tobytes())
        digest.update(self._loss_weight_sums.astype("<f8").tobytes())
        return digest.hexdigest()

    def _step(self, n: int) -> StepPlan:
        epoch = self._epoch_of(n)
        layout, local = self._layout(epoch), n - 1 - self._epoch_starts[epoch]
        first, last = layout.step_offsets[local : local + 2]
        offsets = layout.pack_offsets[first : last + 1].tolist()
        packs = [self._pack(layout.examples[start:end]) for start, end in pairwise(offsets)]
        packs.sort(key=lambda pack: -pack.cost)  # a stable sort: ties keep the shuffled order
        size = self.spec.packs_per_micro_batch
        micro_batches = tuple(tuple(packs[at : at + size]) for at in range(0, len(packs), size))
        return StepPlan(step=n, epoch=epoch, micro_batches=micro_batches)

    def _check_examples(self) -> None:
        if not len(self._lengths):
            raise DataError("there are 0 examples to plan: nothing can be trained or evaluated")
        if self._num_loss_tokens.min() < 1:
            row = int(self._num_loss_tokens.argmin())
            raise DataError(f"example {row} has no supervised token: such rows must not enter the store")

    def _steps_before(self, epoch: int) -> int:
        with self._lock:
            while len(self._epoch_starts) <= epoch:
                self._epoch_starts.append(self._epoch_starts[-1] + self._num_steps_of(len(self._epoch_starts) - 1))
            return self._epoch_starts[epoch]

    def _num_steps_of(self, epoch: int) -> int:
        """One window's pack count depends only on the set of lengths, so then every epoch has epoch 0's steps."""
        same_each_epoch = self.spec.examples_per_step or self.num_examples <= WINDOW_EXAMPLES
        return self._layout(0 if same_each_epoch else epoch).num_steps

    def _epoch_of(self, step: int) -> int:
        while self._epoch_starts[-1] < step:
            self._steps_before(len(self._epoch_starts))
        return bisect_right(self._epoch_starts, step - 1) - 1

    def _layout(self, epoch: int) -> EpochLayout:
        with self._lock:
            if epoch not in self._layouts:
                kept = dict(list(self._layouts.items())[-1:])
                self._layouts = kept | {epoch: lay_out_epoch(self.spec, self._lengths, epoch)}
            return self._layouts[epoch]

    def _pack(self, examples: np.ndarray) -> Pack:
        lengths = self._lengths[examples]
        num_tokens = int(lengths.sum())
        return Pack(
            example_ids=tuple(examples.tolist()),
            num_tokens=num_tokens,
            num_loss_tokens=int(self._num_loss_tokens[examples].sum()),
            loss_weight_sum=math.fsum(self._loss_weight_sums[examples].tolist()),
            cost=num_tokens + int((lengths * lengths).sum()) / TOKENS_WHERE_ATTENTION_WEIGHS_AS_MUCH,
        )

    def _capacity_slots(self) -> int:
        return self.num_packs * self.spec.seq_len

    def _rectangle_slots(self) -> int:
        batches = (rows for step in self._first_epoch() for rows in step.micro_batches)
        return sum(len(rows) * max(row.num_tokens for row in rows) for rows in batches)

    def _first_epoch(self) -> Iterator[StepPlan]:
        return (self._step(number) for number in range(1, self.steps_per_epoch + 1))
