"""Optimizer steps from a stream that nobody can count or index first, planned as far as they are asked for.

    examples in the stream's order -> windows -> shuffled, packed, shuffled packs -> steps

    plan = StreamPlan(spec, stream)      # `stream` knows the examples read so far, and waits for more
    plan.step(17)                        # any step; the stream is read as far as it reaches
    plan.digest_up_to(17)                # equal: the same tokens in the same order up to step 17

Packs and steps are made as `data.plan` makes them, with the same guarantees: every example once per pass, steps that
never see the world size or how the stream was stored, micro-batches sorted by cost, and nothing to resume but a step's
number. Examples move inside their window only. When the stream ends before `spec.max_steps`, it is gone through again
in another order. Memory: one integer per window, and the few windows packed last.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Protocol

import numpy as np

from sft_dist.data.layout import ExampleNumbers, PlanSpec, lay_out_step, pack_examples
from sft_dist.data.packing import Packs, count_best_fit, join
from sft_dist.data.permutation import derive_key, permute
from sft_dist.errors import DataError
from sft_dist.types import StepPlan

WINDOW_EXAMPLES = 16_384  # the first step waits for so many, and examples move so far
_WINDOWS_KEPT = 4


class Stream(Protocol):
    """What is planned: a `StreamStore` is one."""

    fingerprint: str

    def numbers(self, first: int, last: int) -> ExampleNumbers:
        """Of the examples at places first..last-1, once they are there; fewer only where the stream ends."""

    def digest_up_to(self, example: int) -> str:
        """A hash over the tokens of all examples before place `example`, and maybe of some behind it."""


class StreamPlan:
    """Steps 1..`spec.max_steps` of a stream."""

    def __init__(self, spec: PlanSpec, stream: Stream) -> None:
        if spec.max_steps is None:
            raise ValueError("a stream has no length: give max_steps")
        self.spec, self._stream = spec, stream
        self.num_steps: int = spec.max_steps
        self._lock = threading.Lock()  # the loader's thread and the training loop may ask at the same time
        self._table = [0]  # packs before each window that was read (or steps, where each window is one)
        self._num_examples = 0  # in these windows
        self._ended = False
        self._window: Callable[[int, int], tuple[Packs, ExampleNumbers]] = lru_cache(_WINDOWS_KEPT)(self._packed)

    def __len__(self) -> int:
        return self.num_steps

    @property
    def num_examples(self) -> int:
        """Examples in the windows that were read so far."""
        return self._num_examples

    @property
    def efficiency(self) -> float:
        """Real tokens over token slots in the first window."""
        packs, numbers = self._window(0, 0)
        slots = len(packs) * self.spec.seq_len if self.spec.packing == "best_fit" else numbers.lengths.sum()
        return float(numbers.lengths.sum() / slots)

    @property
    def digest(self) -> str:
        """SHA-256 over the settings. The examples are not known before they are read: `digest_up_to` has them."""
        return hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode()).hexdigest()

    def digest_up_to(self, n: int) -> str:
        """SHA-256 over the settings and the tokens of every window that steps 1..n reach into."""
        epoch, index = self.reach(n)
        last_window = len(self._table) - 1 if epoch else self._windows_of_step(index)[-1] + 1
        example = min(last_window * self.spec.window, self._num_examples)
        return hashlib.sha256((self.digest + self._stream.digest_up_to(example)).encode()).hexdigest()

    def step(self, n: int) -> StepPlan:
        """Step `n` (1-based, up to `num_steps`). The last step of a pass may hold fewer micro-batches.

        Raises what reading the stream raises, and DataError for an example that no plan can hold.
        """
        if not 1 <= n <= self.num_steps:
            raise IndexError(f"step {n} is outside 1..{self.num_steps}")
        epoch, index = self.reach(n)
        packs, numbers = self._packs_of_step(epoch, index)
        return lay_out_step(self.spec, packs, numbers, n, epoch)

    def ends_epoch(self, n: int) -> bool:
        """Whether step `n` is known to be the last of a pass over the whole stream: its end was seen."""
        self.reach(n)
        return self._ended and n % -(-self._table[-1] // self._wanted) == 0

    def reach(self, n: int) -> tuple[int, int]:
        """(epoch, place in it) of step `n`, once the stream was read that far."""
        while True:
            with self._lock:
                if n * self._wanted <= self._table[-1]:
                    return 0, n - 1
                if self._ended:
                    return divmod(n - 1, -(-self._table[-1] // self._wanted))
                number, first = len(self._table) - 1, self._num_examples
            self._read_window(number, first)

    def _read_window(self, number: int, first: int) -> None:
        """Count the packs of a window. Not under the lock: it may wait for the stream, and others may not need to."""
        numbers = self._stream.numbers(first, first + self.spec.window)
        num = len(numbers.lengths)
        _check(self.spec, numbers, first)
        if num and self.spec.packs_per_step and self.spec.packing == "best_fit":
            count = int(count_best_fit(numbers.lengths, num, self.spec.seq_len)[0])
        else:
            count = num if self.spec.packs_per_step else min(num, 1)
        with self._lock:
            if len(self._table) - 1 == number and not self._ended:
                if num:
                    self._table.append(self._table[-1] + count)
                self._num_examples += num
                self._ended = num < self.spec.window
                if self._ended and not self._num_examples:
                    raise DataError("the stream ended without an example: nothing can be trained")

    @property
    def _wanted(self) -> int:
        """Packs of a step; 1 window where a step is a number of examples."""
        return self.spec.packs_per_step or 1

    def _windows_of_step(self, index: int) -> range:
        first, last = index * self._wanted, min((index + 1) * self._wanted, self._table[-1])
        return range(bisect_right(self._table, first) - 1, bisect_left(self._table, last))

    def _packs_of_step(self, epoch: int, index: int) -> tuple[Packs, ExampleNumbers]:
        """Packs of the step at place `index` of a pass, in shuffled order, and the numbers of their members."""
        windows = self._windows_of_step(index)
        if self.spec.packs_per_step is None:
            return self._window(epoch, windows[0])
        parts = []
        for number in windows:
            (packs, numbers), start = self._window(epoch, number), self._table[number]
            first, last = max(0, index * self._wanted - start), min(len(packs), (index + 1) * self._wanted - start)
            members = slice(int(packs.offsets[first]), int(packs.offsets[last]))
            parts.append((packs.slice(first, last), numbers.at(members)))
        columns = zip(*(numbers for _, numbers in parts), strict=True)
        return join([packs for packs, _ in parts]), ExampleNumbers(*(np.concatenate(column) for column in columns))

    def _packed(self, epoch: int, number: int) -> tuple[Packs, ExampleNumbers]:
        """A window shuffled and packed; members are places in the stream, with their numbers beside them."""
        first = number * self.spec.window
        numbers = self._stream.numbers(first, first + self.spec.window)
        _check(self.spec, numbers, first)
        order = np.arange(len(numbers.lengths))
        if self.spec.shuffle:
            order = permute(order, len(order), derive_key("stream examples", self.spec.seed, epoch, number))
        packs = pack_examples(self.spec, numbers.lengths[order], derive_key("packs", self.spec.seed, epoch, number))
        members = order[packs.members]
        return Packs(first + members, packs.offsets), numbers.at(members)


def _check(spec: PlanSpec, numbers: ExampleNumbers, first_example: int) -> None:
    """Refuse what no plan can hold, naming the example's place in the stream."""
    faults = (
        ((numbers.lengths < 1) | (numbers.lengths > spec.seq_len), f"must have 1 to {spec.seq_len} tokens (seq_len)"),
        (numbers.num_loss_tokens < 1, "has no supervised token"),
    )
    for wrong, rule in faults:
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(f"stream example {first_example + place} ({numbers.lengths[place]} tokens): {rule}")
