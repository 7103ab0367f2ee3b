"""Signs of life: every rank says where it is, in memory that it shares with its launcher.

    worker      heart().beat(12, "train")     one 32-byte record; no lock, no system call, under a microsecond
    launcher    Heartbeats(2).read(rank)      the newest record of a rank

The memory is an anonymous file (memfd) that workers inherit: nothing to name or to clean up, and no full or stuck disk
can hold up a beat. Under torchrun, accelerate and deepspeed nobody watches; a worker then beats into memory of its own.
Either way `launch/where.py` finds the memory through /proc, for an operator who asks where each rank is.

A record is written field by field, so a reader may see one half of it. That does no harm: what the watchdog looks for
is a record that stays the same.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from functools import cache

HEARTBEATS_VARIABLE = "SFT_HEARTBEATS"  # number of the inherited descriptor
PHASES = ("start", "prepare", "build", "evaluate", "data", "train", "save", "finish")
MEMORY_NAME = "sft-heartbeats"  # as /proc shows it
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_RECORD = struct.Struct("=qqqd")  # first step, step, phase, seconds
_STRIDE = 64  # one cache line per rank


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank was at `seconds` of the machine's monotonic clock; all zero before its first sign."""

    step: int
    phase: str
    seconds: float
    first_step: int  # of this attempt


class Heart:
    """The writing side, one per process."""

    def __init__(self, memory: mmap.mmap, slot: int) -> None:
        self._memory, self._offset, self._first_step = memory, slot * _STRIDE, 0

    def beat(self, step: int, phase: str) -> None:
        """Say that `phase` (one of PHASES) of `step` begins, or goes on."""
        self._first_step = self._first_step or step
        _RECORD.pack_into(self._memory, self._offset, self._first_step, step, _NUMBERS[phase], time.monotonic())

    def stay(self, phase: str) -> None:
        """Say that the step of the last beat goes on, in `phase`."""
        _, step, _, _ = _RECORD.unpack_from(self._memory, self._offset)
        self.beat(step, phase)


@cache
def heart() -> Heart:
    """This process's heart: in the launcher's memory where one was inherited."""
    inherited = os.environ.get(HEARTBEATS_VARIABLE)
    if inherited is None:
        return Heart(Heartbeats(1).memory, 0)
    return Heart(mmap.mmap(int(inherited), 0), int(os.environ["LOCAL_RANK"]))


def decode(memory: mmap.mmap, slot: int) -> Beat:
    """The record in place `slot` of a heartbeat memory."""
    first_step, step, phase, seconds = _RECORD.unpack_from(memory, slot * _STRIDE)
    return Beat(step, PHASES[phase], seconds, first_step)


class Heartbeats:
    """The reading side: records of this machine's `num_ranks` workers, which inherit `fd`."""

    def __init__(self, num_ranks: int) -> None:
        self.fd = os.memfd_create(MEMORY_NAME)
        os.ftruncate(self.fd, num_ranks * _STRIDE)
        self.memory = mmap.mmap(self.fd, 0)

    def read(self, rank: int) -> Beat:
        """The newest sign of `rank`."""
        return decode(self.memory, rank)

    def close(self) -> None:
        """Give the memory back; workers that still run keep theirs."""
        self.memory.close()
        os.close(self.fd)
