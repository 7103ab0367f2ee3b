"""Saving while training goes on: a thread copies the state, while only forward and backward passes run, and writes it.

    saver = BackgroundSaver(manager)
    saver.begin(step, tensors, meta)      returns at once: a thread copies `tensors` to host memory and writes
    saver.wait_for_copy()                 before `tensors` change, that is, before the next update of the weights
    saver.is_written                      travels in the verdict of every later step
    saver.commit()                        once it is true on all ranks; before the next save
    saver.save(step, tensors, meta)       without a copy: committed when it returns
    saver.close()                         before the run ends

The thread fills a folder that is no checkpoint, and speaks with the threads of the other ranks over a process group of
its own. The commit (the rename, and taking old ones out of the way) happens on the main path only, so a crash at any
moment leaves what it leaves in a save that is waited for. What went wrong in the thread is raised, on all ranks alike,
by the `commit` that finds it. The copy stays allocated between saves: its pages cost more than the copying.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sft_dist.checkpoint.host_copy import HostCopy
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.shards import num_bytes
from sft_dist.checkpoint.sweeper import Sweeper
from sft_dist.errors import SftError


@dataclass(slots=True)
class Write:
    """A save under way."""

    step: int
    tensors: Mapping[str, Tensor]  # until they are copied, or written where they are copies already
    size: int  # of all of them, bytes
    meta: Mapping[str, Any]
    also_keep: int | None
    began: float
    ended: float = 0.0  # when it was there to be committed
    is_copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    partial: Path | None = None  # none is made where a good checkpoint of the step is there already
    error: BaseException | None = None  # that the thread met


class BackgroundSaver:
    """At most one save under way; every method but `wait_for_copy` and `is_written` is collective."""

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager, self._aside = manager, manager.aside()
        self._copy, self._sweeper = HostCopy(), Sweeper(manager.folder)
        self._write: Write | None = None
        self.slowest_seconds = 0.0  # that writing and committing took, without the time in between

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> None:
        """`CheckpointManager.save`, after what is under way: the last one of a run, so the copy is given back."""
        self.close()
        self._copy.release()
        self._manager.save(step, tensors, meta, also_keep=also_keep)

    def try_save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> None:
        """`CheckpointManager.try_save`, after what is under way."""
        self.close()
        began = time.monotonic()
        self._manager.try_save(step, tensors, meta, also_keep=also_keep)
        self._took(time.monotonic() - began)

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        also_keep: int | None = None,
        are_copies: bool = False,
    ) -> None:
        """Begin what `try_save` does; `wait_for_copy` says when `tensors` may be changed again. `are_copies`: nobody
        else has them, and they are on the host; they are not copied once more."""
        self.close()
        write = Write(step, tensors, num_bytes(tensors), dict(meta), also_keep, began=time.monotonic())
        if are_copies:
            write.is_copied.set()
        else:
            self._copy.fit(tensors)
        write.thread = threading.Thread(target=self._run, args=(write,), name="sft-saver", daemon=True)
        self._write = write
        write.thread.start()

    def wait_for_copy(self) -> None:
        """Until the tensors of the last `begin` may be changed: there is nothing to wait for in all other steps."""
        if self._write is not None:
            self._write.is_copied.wait()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a save is there to be committed. Raises what this rank alone has met: the
        threads of the others would wait for it."""
        write = self._write
        if write is None or write.thread is None or write.thread.is_alive():
            return False
        if write.error is not None and not isinstance(write.error, SftError):
            raise write.error
        return True

    def commit(self) -> None:
        """Commit the save under way, once it is written. Nothing to do without one.

        What the disk refused is told and passed over as by `try_save`. Raises on all ranks alike: StorageError for the
        third save in a row that fails, NonFiniteError.
        """
        write = self._write
        if write is None or write.thread is None:
            return
        write.thread.join()
        self._write = None
        if write.error is not None:  # its frames hold the copies, and this save: memory until Python looks for cycles
            traceback.clear_frames(write.error.__traceback__)
        with self._manager.tolerating(write.step), self._manager.discarding(write.partial):
            if write.error is not None:
                raise write.error
            if write.partial is None:
                return
            committing = time.monotonic()
            self._manager.commit(write.step, write.partial, write.size, write.also_keep, self._sweeper.delete)
            self._took(write.ended - write.began + time.monotonic() - committing)

    def close(self) -> None:
        """Commit what is under way and see old checkpoints gone."""
        self.commit()
        for error in self._sweeper.finish():
            self._manager.tell_undeleted(error)

    def _took(self, seconds: float) -> None:
        self.slowest_seconds = max(self.slowest_seconds, seconds)

    def _run(self, write: Write) -> None:
        try:
            try:
                copied = write.tensors if write.is_copied.is_set() else self._copy.take(write.tensors)
            finally:
                write.tensors = {}
                write.is_copied.set()
            write.partial = self._aside.open(write.step, copied)
            if write.partial is not None:
                self._aside.write(write.step, write.partial, copied, write.meta)
        except BaseException as error:  # raised on the main path
            write.error = error
        write.ended = time.monotonic()
