"""What every optimizer step trains on, as a pure function that never sees world size, workers, devices or time.

    lengths, seed, epoch -> shuffled order -> windows -> packs -> shuffled packs -> steps -> micro-batches by cost

    plan = build_plan(lengths=..., seq_len=2048, packs_per_micro_batch=4, micro_batches_per_step=8, seed=0, ...)
    plan.step(17)      # any step at any time: nothing to replay, so resuming needs one integer
    plan.digest        # two plans with equal digests train on the same tokens in the same order

What is kept is an offset table per epoch (packs before each window: 764 integers for 10^8 examples) and the few windows
packed last. Step n is found in the table and its windows are packed again, about 10 ms each; `data.layout` says how.

Inside a step, packs are sorted by cost, so that the micro-batches the ranks work on at the same time cost about the
same: for groups of a fixed size this minimises the sum over rounds of the slowest rank's cost.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, lru_cache, partial

import numpy as np

from sft_dist.data.layout import (
    SQUARED_TOKEN_COST,
    TOKEN_COST,
    WINDOW_EXAMPLES,
    ExampleNumbers,
    PlanSpec,
    count_packs,
    lay_out_step,
    num_windows,
    pack_costs,
    pack_window,
)
from sft_dist.data.packing import Packs, join
from sft_dist.errors import DataError
from sft_dist.types import StepPlan

_WINDOWS_KEPT = 4  # a step mostly lies in one or two windows; the loader and the training loop may ask alternately
_EXAMPLES_MEASURED = (
    8 * WINDOW_EXAMPLES
)  # balance of more is estimated; packing that many takes 0.1 s, cutting small steps 1 s
_DIGEST_BLOCK = 1 << 20  # examples hashed at a time


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
    token_cost: float = TOKEN_COST,
    squared_token_cost: float = SQUARED_TOKEN_COST,
    window_examples: int = WINDOW_EXAMPLES,
    tables: Mapping[str, np.ndarray] | None = None,
) -> PackPlan:
    """Plan a training run.

    `lengths`, `num_loss_tokens`, `loss_weight_sums`: [N] per example, as a `TokenStore` holds them, of any number type;
    they may be mapped files and are never copied whole. A step is either `micro_batches_per_step` micro-batches of
    `packs_per_micro_batch` packs, or the packs of `examples_per_step` consecutive shuffled examples. `max_steps`
    overrides `epochs` and runs on over further epochs. A pack costs `token_cost` per token and `squared_token_cost` per
    squared length of each document in it. `tables`: what `to_arrays` of an equal plan gave, to save the pass over the
    lengths.
    Raises DataError when there is nothing to train on, for an example without a supervised token, and for tables of
    another plan.
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
        token_cost=token_cost,
        squared_token_cost=squared_token_cost,
        window_examples=window_examples,
    )
    columns = (np.asarray(column) for column in (lengths, num_loss_tokens, loss_weight_sums))
    return PackPlan(spec, ExampleNumbers(*columns), tables or {})


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
    """Steps 1..num_steps, each computed when asked for."""

    def __init__(self, spec: PlanSpec, numbers: ExampleNumbers, tables: Mapping[str, np.ndarray]) -> None:
        self.spec = spec
        self._numbers = numbers
        self._check_examples()
        self._lock = threading.RLock()  # the loader's thread and the training loop may ask at the same time
        self._tables: dict[int, np.ndarray] = {}  # epoch -> packs before each window, and in all
        self._window = lru_cache(maxsize=_WINDOWS_KEPT)(partial(pack_window, spec, numbers.lengths))
        for name, table in tables.items():
            self._tables[int(name)] = self._checked_table(int(name), np.asarray(table))
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
        epoch = self._epoch_of(n)
        packs = self._packs_of_step(epoch, n - 1 - self._epoch_starts[epoch])
        return lay_out_step(self.spec, packs, self._numbers.at(packs.members), n, epoch)

    def reach(self, n: int) -> None:
        """Wait for the examples of step `n`: they are all there."""

    def digest_up_to(self, n: int) -> str:
        """What steps 1..n train on: the digest, which covers all steps."""
        return self.digest

    @property
    def num_examples(self) -> int:
        return len(self._numbers.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch. Later ones may differ by a step when the data fills several windows."""
        return self._steps_before(1)

    @property
    def num_packs(self) -> int:
        """Packs of the first epoch."""
        return self.packs_in_epoch(0)

    @property
    def num_epochs(self) -> int:
        """Epochs that are begun."""
        return self._epoch_of(self.num_steps) + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether no step of the same epoch follows `step`; `max_steps` may end the plan before that."""
        return step == self._steps_before(self._epoch_of(step) + 1)

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens of an epoch."""
        return int(self._numbers.lengths.sum(dtype=np.int64))

    def packs_in_epoch(self, epoch: int) -> int:
        return int(self._table(epoch)[-1])

    @cached_property
    def num_slots(self) -> int:
        """Places for tokens in the first epoch, before rounding up to a multiple; those without a token are padding.

        `best_fit`: the capacity of all packs. `padded`: positions of the [B, S] rectangles. `none`: the tokens.
        """
        if self.spec.packing == "best_fit":
            return self.num_packs * self.spec.seq_len
        return self.num_tokens if self.spec.packing == "none" else self._rectangle_slots()

    @property
    def efficiency(self) -> float:
        """Real tokens over token slots in the first epoch."""
        return self.num_tokens / self.num_slots

    @property
    def measured_share(self) -> float:
        """The share of the first epoch's steps that `balance`, and `padded`'s slots, are measured on; 1.0 is exact."""
        return len(self._measured_steps) / self.steps_per_epoch

    def balance(self, world_size: int) -> float:
        """Mean over slowest rank's cost, summed over the rounds of the measured steps; 1.0 when nobody ever waits."""
        waited_for = sum(
            np.maximum.reduceat(costs, np.arange(0, len(costs), world_size)).sum() for costs in self._micro_batch_costs
        )
        return float(sum(costs.sum() for costs in self._micro_batch_costs) / (waited_for * world_size))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the settings, the examples' numbers, and the first epoch's offsets, first and last window.

        The offsets and windows are part of it so that a change of the packing code shows where no setting changed.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
        for column, form in zip(self._numbers, ("<u4", "<u4", "<f8"), strict=True):
            for at in range(0, self.num_examples, _DIGEST_BLOCK):
                digest.update(column[at : at + _DIGEST_BLOCK].astype(form).tobytes())
        digest.update(self._table(0).astype("<i8").tobytes())
        for number in (0, num_windows(self.spec, self.num_examples) - 1):
            packs = self._window(0, number)
            digest.update(packs.members.astype("<i8").tobytes() + packs.offsets.astype("<i8").tobytes())
        return digest.hexdigest()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The offset tables made so far, by epoch: what a cache may keep under the plan's inputs, for `tables`."""
        return {str(epoch): table for epoch, table in self._tables.items()}

    def _check_examples(self) -> None:
        if not self.num_examples:
            raise DataError("there are 0 examples to plan: nothing can be trained or evaluated")
        if self._numbers.num_loss_tokens.min() < 1:
            row = int(self._numbers.num_loss_tokens.argmin())
            raise DataError(f"example {row} has no supervised token: such rows must not enter the store")

    def _steps_before(self, epoch: int) -> int:
        with self._lock:
            while len(self._epoch_starts) <= epoch:
                self._epoch_starts.append(self._epoch_starts[-1] + self._steps_in(len(self._epoch_starts) - 1))
            return self._epoch_starts[epoch]

    def _steps_in(self, epoch: int) -> int:
        if self.spec.packs_per_step is None:
            return num_windows(self.spec, self.num_examples)
        return -(-self.packs_in_epoch(epoch) // self.spec.packs_per_step)

    def _epoch_of(self, step: int) -> int:
        while self._epoch_starts[-1] < step:
            self._steps_before(len(self._epoch_starts))
        return bisect_right(self._epoch_starts, step - 1) - 1

    def _table(self, epoch: int) -> np.ndarray:
        """Packs before each window of an epoch and, last, in all of it: int64[num_windows + 1]."""
        with self._lock:
            if epoch and (not self.spec.shuffle or self.num_examples <= self.spec.window):
                return self._table(0)  # how many packs a window makes depends only on which lengths are in it
            if epoch not in self._tables:
                self._tables[epoch] = _table_of(count_packs(self.spec, self._numbers.lengths, epoch))
            return self._tables[epoch]

    def _checked_table(self, epoch: int, table: np.ndarray) -> np.ndarray:
        """A table from outside, its shape and two of its windows verified."""
        last = num_windows(self.spec, self.num_examples) - 1
        if len(table) != last + 2 or any(
            table[number + 1] - table[number] != len(self._window(epoch, number)) for number in (0, last)
        ):
            raise DataError(f"the cached offset table of epoch {epoch} belongs to another plan: delete it")
        return table

    def _packs_of_step(self, epoch: int, index: int) -> Packs:
        """Packs of the step at place `index` of an epoch, in shuffled order."""
        if self.spec.packs_per_step is None:
            return self._window(epoch, index)
        table = self._table(epoch)
        first = index * self.spec.packs_per_step
        last = min(first + self.spec.packs_per_step, int(table[-1]))
        windows = range(int(np.searchsorted(table, first, "right")) - 1, int(np.searchsorted(table, last)))
        starts = table[list(windows)].tolist()
        packed = zip(self._windows(epoch, windows), starts, strict=True)
        return join([packs.slice(max(0, first - start), last - start) for packs, start in packed])

    def _windows(self, epoch: int, numbers: Sequence[int]) -> list[Packs]:
        """Those windows, several at a time where there are cores: packing lets go of the interpreter's lock."""
        if len(numbers) == 1 or self.spec.window < WINDOW_EXAMPLES:
            return [self._window(epoch, number) for number in numbers]
        with ThreadPoolExecutor(min(len(numbers), len(os.sched_getaffinity(0)))) as threads:
            return list(threads.map(partial(self._window, epoch), numbers))

    @cached_property
    def _measured_steps(self) -> list[int]:
        """Places of the steps that measurements use: all of them, or those beginning in windows spread evenly."""
        total = num_windows(self.spec, self.num_examples)
        num_chosen = max(1, _EXAMPLES_MEASURED // self.spec.window)
        if self.num_examples <= _EXAMPLES_MEASURED or num_chosen >= total:
            return list(range(self.steps_per_epoch))
        windows = np.linspace(0, total - 1, num_chosen).astype(np.int64)
        if self.spec.packs_per_step is None:
            return windows.tolist()
        table = -(-self._table(0) // self.spec.packs_per_step)  # steps that begin before each window
        return [step for number in windows for step in range(table[number], table[number + 1])]

    @cached_property
    def _micro_batch_costs(self) -> list[np.ndarray]:
        """For each measured step, what its micro-batches cost, in order."""
        size = self.spec.packs_per_micro_batch
        steps = (self._packs_of_step(0, index) for index in self._measured_steps)
        by_pack = (pack_costs(self.spec, packs, self._numbers.lengths[packs.members]) for packs in steps)
        return [np.add.reduceat(-np.sort(-costs), np.arange(0, len(costs), size)) for costs in by_pack]

    def _rectangle_slots(self) -> int:
        slots, tokens = 0, 0
        for index in self._measured_steps:
            rows = -np.sort(-self._numbers.lengths[self._packs_of_step(0, index).members].astype(np.int64))
            starts = np.arange(0, len(rows), self.spec.packs_per_micro_batch)
            slots += int((rows[starts] * np.diff(starts, append=len(rows))).sum())
            tokens += int(rows.sum())
        return slots if tokens == self.num_tokens else round(slots * (self.num_tokens / tokens))


def _table_of(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
