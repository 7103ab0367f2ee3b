"""Optimizer steps from a stream of examples that nobody can count or index first.

    lengths as they arrive -> windows of 131,072 -> shuffled, packed, shuffled packs -> steps, with a cursor after each

    for step in StreamPlan(spec, numbers):               # ExampleNumbers in chunks of any size
        train(step.plan); checkpoint(step.after)         # four integers
    StreamPlan(spec, numbers_from(after.first_example), after=after)    # goes on with the very next step

The order is the stream's, shuffled inside each window; packs and steps are made as `data.plan` makes them, with the
same guarantees: every example once, steps that never see the world size or how the stream was chunked, micro-batches
sorted by cost, any interruption resumed exactly. What a stream cannot give is a step count in advance or a step out
of turn. Memory: the windows a step reaches into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np

from sft_dist.data.layout import ExampleNumbers, PlanSpec, lay_out_step, pack_examples
from sft_dist.data.packing import Packs, join
from sft_dist.data.permutation import derive_key, permute
from sft_dist.errors import DataError
from sft_dist.types import StepPlan


@dataclass(frozen=True, slots=True)
class StreamCursor:
    """Where a stream stands after a step: all that a checkpoint needs."""

    step: int = 0  # steps done
    window: int = 0  # the first window that is not used up
    packs_taken: int = 0  # packs of that window which earlier steps took
    first_example: int = 0  # where that window begins: earlier examples are not needed again


@dataclass(frozen=True, slots=True)
class StreamStep:
    """A step, whose example ids are places in the stream, and where the stream stands after it."""

    plan: StepPlan
    after: StreamCursor


@dataclass(frozen=True, slots=True)
class _Window:
    """A packed window, or what is left of it."""

    number: int
    taken: int  # packs that steps have taken
    packs: Packs  # the rest; members are places in the stream
    numbers: ExampleNumbers  # of the members

    def split(self, num_packs: int) -> tuple[_Window, _Window]:
        """The first `num_packs` packs, and what remains."""
        cut = int(self.packs.offsets[num_packs])
        first = replace(self, packs=self.packs.slice(0, num_packs), numbers=self.numbers.at(slice(cut)))
        rest = _Window(
            self.number,
            self.taken + num_packs,
            self.packs.slice(num_packs, len(self.packs)),
            self.numbers.at(slice(cut, None)),
        )
        return first, rest


class StreamPlan:
    """Steps in order, planned as far as they are asked for.

    `stream`: the examples from `after.first_example` on, in chunks of any size. `spec.epochs` does not matter: a stream
    is gone through once, as epoch `epoch`; `spec.max_steps` ends it early.
    """

    def __init__(
        self, spec: PlanSpec, stream: Iterable[ExampleNumbers], *, after: StreamCursor = StreamCursor(), epoch: int = 0
    ) -> None:
        self.spec = spec
        self._stream, self._after, self._epoch = stream, after, epoch

    def __iter__(self) -> Iterator[StreamStep]:
        """Raises DataError where an example is too long for a pack, empty, or without a supervised token."""
        max_steps = self.spec.max_steps
        return islice(self._steps(), None if max_steps is None else max(0, max_steps - self._after.step))

    def _steps(self) -> Iterator[StreamStep]:
        done, waiting = self._after.step, []
        wanted = self.spec.packs_per_step or 1  # where a step is a number of examples, each window is one
        for window in self._packed():
            waiting.append(window)
            while sum(len(some.packs) for some in waiting) >= wanted:
                done += 1
                step, waiting = self._step(done, waiting)
                yield step
        if waiting:
            yield self._step(done + 1, waiting)[0]

    def _step(self, number: int, waiting: list[_Window]) -> tuple[StreamStep, list[_Window]]:
        """The next step from the packs that wait, and the windows that are left."""
        taken, left = [], []
        wanted = self.spec.packs_per_step or sum(len(window.packs) for window in waiting)
        for window in waiting:
            first, rest = window.split(min(wanted, len(window.packs)))
            wanted -= len(first.packs)
            taken.append(first)
            left += [rest] if len(rest.packs) else []
        packs = join([window.packs for window in taken])
        columns = zip(*(window.numbers for window in taken), strict=True)
        numbers = ExampleNumbers(*(np.concatenate(column) for column in columns))
        window_number, packs_taken = (left[0].number, left[0].taken) if left else (waiting[-1].number + 1, 0)
        after = StreamCursor(number, window_number, packs_taken, window_number * self.spec.window)
        return StreamStep(lay_out_step(self.spec, packs, numbers, number, self._epoch), after), left

    def _packed(self) -> Iterator[_Window]:
        """Windows shuffled and packed, without the packs that were taken before the cursor."""
        skipped = self._after.packs_taken
        for number, numbers in zip(count(self._after.window), _rewindowed(self._stream, self.spec.window)):
            first_example, size = number * self.spec.window, len(numbers.lengths)
            _check(self.spec, numbers, first_example)
            order = np.arange(size)
            if self.spec.shuffle:
                order = permute(order, size, derive_key("stream examples", self.spec.seed, self._epoch, number))
            key = derive_key("packs", self.spec.seed, self._epoch, number)
            packs = pack_examples(self.spec, numbers.lengths[order], key)
            members = order[packs.members]
            window = _Window(number, 0, Packs(first_example + members, packs.offsets), numbers.at(members))
            yield window.split(skipped)[1]
            skipped = 0


def _rewindowed(stream: Iterable[ExampleNumbers], size: int) -> Iterator[ExampleNumbers]:
    """The same examples in chunks of exactly `size`, the last one shorter."""
    held: list[ExampleNumbers] = []
    num_held = 0
    for chunk in stream:
        columns = ExampleNumbers(*(np.asarray(column) for column in chunk))
        held.append(columns)
        num_held += len(columns.lengths)
        while num_held >= size:
            together = _concatenated(held)
            yield together.at(slice(size))
            held, num_held = [together.at(slice(size, None))], num_held - size
    if num_held:
        yield _concatenated(held)


def _concatenated(chunks: list[ExampleNumbers]) -> ExampleNumbers:
    return ExampleNumbers(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


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
