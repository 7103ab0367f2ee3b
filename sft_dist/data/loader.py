"""Step numbers in, this rank's batches out, the next step always being prepared in one background thread.

    loader = Loader(store, plan, rank=1, world_size=2, packing="best_fit", pad_token_id=0, pad_to_multiple_of=64)
    loaded = loader.step(17)          # any order is right; 17, 18, 19 is fast
    for index, batch in zip(loaded.indices, loaded.batches): ...

Rank r of W takes micro-batches r, W + r, 2W + r ... of the plan. Where W does not divide their number, the last round
is filled with empty micro-batches: every rank makes the same number of forward passes. Nothing here is state: the
position is the step number the caller asks for, prefetching is only a cache. Where several processes share each
micro-batch (sequence parallel), r and W count their groups and `cut` takes this process's tokens out of the row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from sft_dist.data.collate import Documents, batch_digest, collate
from sft_dist.types import Pack, PackedBatch, StepPlan

_CLOSE_SECONDS = 5.0  # a read that hangs must not keep the process from ending


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """One step as this rank trains it."""

    step: StepPlan  # global: the divisor of the loss is in it
    batches: tuple[PackedBatch, ...]  # this rank's micro-batches, one per round
    indices: tuple[int, ...]  # global number of each of them, for seeds; empty ones count on beyond the plan's
    digest: str  # of the global batch; "" where the loader was not to make it


class VerifiedDocuments(Documents, Protocol):
    """What a loader reads of a store."""

    def verify(self, index: int) -> None: ...  # raises DataError when the example is not what was written


class Plan(Protocol):
    """What a loader asks a plan: a `PackPlan` or a `StreamPlan`."""

    num_steps: int

    def step(self, n: int) -> StepPlan: ...

    def reach(self, n: int) -> object: ...  # waits until the examples of step `n` are there


def dealt(num_micro_batches: int, rank: int, world_size: int) -> range:
    """Global numbers of the micro-batches that `rank` trains of a step, one per round; the empty ones that fill the
    last round count on beyond the step's own."""
    num_rounds = -(-num_micro_batches // world_size)
    return range(rank, num_rounds * world_size, world_size)


class Loader:
    """Turns a plan and a store into one rank's batches on the CPU, pinned when `device` is a CUDA device."""

    def __init__(
        self,
        store: VerifiedDocuments,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        packing: str,
        pad_token_id: int,
        pad_to_multiple_of: int,
        device: torch.device | str = "cpu",
        cut: Callable[[PackedBatch], PackedBatch] = lambda whole: whole,
        reads_all: bool = True,
    ) -> None:
        """`reads_all`: verify and hash the whole global batch. One process of a run has to; for the others it would be
        work, and reading, that grows with the number of ranks.
        """
        self._store, self._plan = store, plan
        self._rank, self._world_size = rank, world_size
        self._packing, self._pad_token_id, self._multiple = packing, pad_token_id, pad_to_multiple_of
        self._pinned, self._cut, self._reads_all = torch.device(device).type == "cuda", cut, reads_all
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[int, LoadedStep | BaseException]] = queue.SimpleQueue()
        self._closed = False
        self._pending: int | None = None  # the step the thread works on, or has finished
        self._thread = threading.Thread(target=self._prefetch, name="sft-loader", daemon=True)
        self._thread.start()

    def step(self, n: int) -> LoadedStep:
        """This rank's part of step `n` (1-based). What went wrong in the background is raised here.

        Raises IndexError outside the plan, whatever reading the store raises, and RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        self._plan.reach(n)  # here and not in the thread: only this one's waiting is a sign of life
        loaded = self._take(n)
        if n < self._plan.num_steps:
            self._ask(n + 1)
        return loaded

    def close(self) -> None:
        """End the background thread. May be called twice; never waits longer than a few seconds."""
        self._closed = True
        self._wanted.put(None)
        self._thread.join(timeout=_CLOSE_SECONDS)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def build(self, n: int) -> LoadedStep:
        """Step `n` computed here and now, without the thread: the reference for what `step` returns.

        Every example that is used is compared with its digest: a bit that fell over on the disk must not be trained.
        """
        step = self._plan.step(n)
        indices = tuple(dealt(len(step.micro_batches), self._rank, self._world_size))
        own = (pack for index in indices for pack in _micro_batch(step, index))
        for pack in step.packs if self._reads_all else own:
            for example in pack.example_ids:
                self._store.verify(example)
        batches = tuple(self._batch(step, index) for index in indices)
        digest = batch_digest(step, self._store) if self._reads_all else ""
        return LoadedStep(step=step, batches=batches, indices=indices, digest=digest)

    def micro_batch(self, n: int, index: int) -> PackedBatch:
        """Micro-batch `index` of step `n`, whichever rank trains it."""
        return self._batch(self._plan.step(n), index)

    def _batch(self, step: StepPlan, index: int) -> PackedBatch:
        return self.batch_of(_micro_batch(step, index))

    def batch_of(self, micro_batch: tuple[Pack, ...]) -> PackedBatch:
        """These packs as one micro-batch of this rank."""
        whole = collate(
            micro_batch,
            self._store,
            packing=self._packing,
            pad_token_id=self._pad_token_id,
            pad_to_multiple_of=self._multiple,
        )
        batch = self._cut(whole)
        return _pin(batch) if self._pinned else batch

    def _ask(self, n: int) -> None:
        self._pending = n
        self._wanted.put(n)

    def _take(self, n: int) -> LoadedStep:
        if self._pending is not None:  # at most one result is under way; another step's is dropped
            number, result = self._ready.get()
            self._pending = None
            if number == n:
                if isinstance(result, BaseException):
                    raise result
                return result
        return self.build(n)

    def _prefetch(self) -> None:
        while (n := self._wanted.get()) is not None:
            try:
                self._ready.put((n, self.build(n)))
            except BaseException as error:  # handed to the caller, who asked for this step
                self._ready.put((n, error))


def _micro_batch(step: StepPlan, index: int) -> tuple[Pack, ...]:
    """Packs of micro-batch `index`; none of one that fills the last round."""
    return step.micro_batches[index] if index < len(step.micro_batches) else ()


def _pin(batch: PackedBatch) -> PackedBatch:
    """Page-locked copies of the tensors, so that `.to(device)` overlaps with computing."""
    for name in ("input_ids", "labels", "loss_weights", "position_ids", "cu_seqlens", "attention_mask"):
        tensor = getattr(batch, name)
        if tensor is not None:
            setattr(batch, name, tensor.pin_memory())
    return batch
