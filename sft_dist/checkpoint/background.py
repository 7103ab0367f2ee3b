"""Saving while training goes on: the loop waits for one copy of the state, a thread writes that copy.

    saver = BackgroundSaver(manager)
    saver.begin(step, tensors, meta)      copy to host memory; the write begins
    saver.is_written                      travels in the verdict of every later step
    saver.commit()                        once it is true on all ranks; before the next save; before the run ends
    saver.save(step, tensors, meta)       without a copy: committed when it returns

The thread fills a folder that is no checkpoint, and speaks with the threads of the other ranks over a process group of
its own. The commit (manifest, rename, deleting old ones) happens on the main path only, so a crash at any moment leaves
what it leaves in a save that is waited for. What went wrong in the thread is raised, on all ranks alike, by the
`commit` that finds it. The copy stays allocated between saves: its pages cost more than the copying.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import FileEntry
from sft_dist.checkpoint.ranks import Ranks


@dataclass(slots=True)
class Write:
    """A save under way."""

    step: int
    partial: Path
    meta: Mapping[str, Any]
    also_keep: int | None
    began: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    files: dict[str, FileEntry] | None = None  # what the thread wrote
    error: BaseException | None = None  # or what it met


class BackgroundSaver:
    """At most one save under way; every method is collective."""

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager = manager
        self._ranks = Ranks()  # for the thread alone: its messages never mix with those of the main path
        self._copy = HostCopy()
        self._write: Write | None = None
        self.slowest_seconds = 0.0  # from the beginning of a save to its commit

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> None:
        """`CheckpointManager.save`, after what is under way: the last one of a run, so the copy is given back."""
        self.commit()
        self._copy = HostCopy()
        self._manager.save(step, tensors, meta, also_keep=also_keep)

    def try_save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> None:
        """`CheckpointManager.try_save`, after what is under way."""
        self.commit()
        self._manager.try_save(step, tensors, meta, also_keep=also_keep)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> None:
        """Begin what `try_save` does; when this returns, `tensors` may be changed again."""
        self.commit()
        partial = None
        with self._manager.tolerating(step):
            partial = self._manager.open(step, tensors)
        if partial is None:
            return
        copied = self._copy.take(tensors)
        write = Write(step, partial, dict(meta), also_keep)
        write.thread = threading.Thread(target=self._run, args=(write, copied), name="sft-saver", daemon=True)
        self._write = write
        write.thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a save is there to be committed."""
        return self._write is not None and self._write.thread is not None and not self._write.thread.is_alive()

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
        with self._manager.tolerating(write.step), self._manager.discarding(write.partial):
            if write.error is not None:
                raise write.error
            assert write.files is not None
            self._manager.commit(write.step, write.partial, self._copy.tensors, write.files, write.meta)
            self._manager.retire(write.also_keep)
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - write.began)

    def _run(self, write: Write, copied: Mapping[str, Tensor]) -> None:
        try:
            write.files = self._manager.write(write.partial, copied, self._ranks)
        except BaseException as error:  # raised on the main path
            write.error = error


class HostCopy:
    """The state in host memory (page-locked beside a GPU), laid out over the ranks as the original is."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Overwrite the copy with `tensors`; complete when this returns."""
        if not _same_layout(self.tensors, tensors):
            self.tensors = {name: self._like(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            _local(self.tensors[name]).copy_(_local(tensor), non_blocking=True)
        if any(_local(tensor).is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self.tensors

    def _like(self, tensor: Tensor) -> Tensor:
        piece = _local(tensor)
        empty = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        if not isinstance(tensor, DTensor):
            return empty
        mesh = self._host_mesh(tensor.device_mesh)
        return DTensor.from_local(
            empty, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same ranks with CPU tensors: a DTensor moves its piece to the device of its mesh."""
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = init_device_mesh("cpu", tuple(mesh.shape))
        return self._meshes[mesh]


def _same_layout(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return held.keys() == wanted.keys() and all(
        (_local(held[name]).shape, held[name].dtype) == (_local(tensor).shape, tensor.dtype)
        for name, tensor in wanted.items()
    )


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
