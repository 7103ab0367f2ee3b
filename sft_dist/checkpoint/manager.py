"""Resumable state on disk: written to a fresh folder, proven, then committed by one rename.

    checkpoints/.tmp-<random>/      every rank writes and fsyncs its safetensors shards here (DCP, no pickle)
      -> every rank hashes what it wrote; rank 0 checks that exactly these files are there
      -> manifest.json, fsync of it and of the folder
    checkpoints/step-00000100/      rename, fsync of the parent: from here on it is a checkpoint
      -> only then older ones are deleted

A kill, a full disk or an error at any point leaves either the old state or the new one, never a mixture: no existing
folder is ever written into. Loading reads nothing before its SHA-256 was compared; a bad checkpoint is renamed aside
with a notice and the next older good one is used. Every public method is collective: all ranks call it.

Plain tensors (one process, DDP) are written once, spread over the ranks; DTensors (FSDP2) by their shards. Both read
back into any number of ranks.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sft_dist.checkpoint.catalog import FOLDER_NAME, folders, open_to_all, set_aside
from sft_dist.checkpoint.disk import check_space, free_name, rename_fresh, storage_errors, wait_to_see
from sft_dist.checkpoint.manifest import (
    MANIFEST_NAME,
    RUN_KEY,
    FileEntry,
    Manifest,
    content_fault,
    folder_fault,
    folder_step,
    hash_file,
    read_manifest,
    run_fault,
    step_name,
    write_manifest,
)
from sft_dist.checkpoint.ranks import Ranks
from sft_dist.checkpoint.shards import (
    check_finite,
    check_same,
    describe_tensors,
    num_bytes,
    read_shards,
    shard_pattern,
    write_shards,
)
from sft_dist.durable import fsync_path
from sft_dist.errors import CheckpointError, StorageError

PARTIAL_PREFIX = ".tmp-"
FAILURES_LIMIT = 3  # failed saves in a row: by then more work would be lost than the disk is worth waiting for
FAIL_POINTS = (
    "before write",
    "after write",
    "before manifest",
    "after manifest",
    "before rename",
    "after rename",
    "after commit",
    "while deleting",
)


def print_notice(text: str) -> None:
    """One line for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run folder; hold the run's lock while one exists.

    `keep` newest ones stay. `run` names the run: its checkpoints carry it, and one that carries another name is bad.
    `notice` gets each line that a user should see (rank 0 only). `ready` is called on rank 0 before each commit, and an
    OSError of it fails the save: what a checkpoint stands for has to be written before it.
    `fence` is called on rank 0 right before the rename and raises LockedError when the folder has another owner by now.
    `trusts_all` reads checkpoints that anyone on the machine may have changed, sums and all. `versions` is what the
    manifests keep of the machine that they were written on.
    `fail_point` is called with each name of FAIL_POINTS as the commit passes it: tests kill the process there.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 2,
        *,
        run: str | None = None,
        notice: Callable[[str], None] = print_notice,
        ready: Callable[[], None] = lambda: None,
        fence: Callable[[], None] = lambda: None,
        trusts_all: bool = False,
        versions: Mapping[str, str] = MappingProxyType({}),
        fail_point: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.run_dir, self.keep = Path(run_dir), keep
        self.folder = self.run_dir / FOLDER_NAME
        self.ranks = Ranks()
        self._notice, self._fail_point, self._ready, self._fence = notice, fail_point, ready, fence
        self._trusts_all, self.versions = trusts_all, versions
        self._failures = 0  # in a row
        self._run = run
        self._proven: Path | None = None  # whose files were proven last, until it is read
        self._on_main(self._clear_leftovers)

    # ---- saving

    def try_save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> Path | None:
        """`save`, where the run can go on without: None, with a notice, when the disk is full, failing or read-only.

        Raises StorageError when that was the third time in a row.
        """
        path = None
        with self.tolerating(step):
            path = self.save(step, tensors, meta, also_keep=also_keep)
        return path

    @contextmanager
    def tolerating(self, step: int) -> Iterator[None]:
        """A StorageError of the save of `step` becomes a notice, unless it is the third in a row."""
        try:
            yield
        except StorageError as error:
            self._failures += 1
            if self._failures == FAILURES_LIMIT:
                raise StorageError(f"{error} ({FAILURES_LIMIT} saves in a row have failed)") from error
            left = FAILURES_LIMIT - self._failures
            self._notice(f"warning: step {step} was not saved: {error}; training goes on, {left} more may fail")

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, also_keep: int | None = None
    ) -> Path:
        """Commit `tensors` (each at least 1-dim) and the JSON value `meta` as the state of `step`; returns the folder.

        The checkpoint of step `also_keep` (the best one so far) is not counted among the old ones that are deleted.

        A good checkpoint of that step is left as it is. Raises, on all ranks alike, StorageError when it cannot be
        written and NonFiniteError when a tensor holds a NaN or infinity; older checkpoints are untouched then.
        """
        partial = self.open(step, tensors)
        if partial is not None:
            with self.discarding(partial):
                self.write(step, partial, tensors, meta)
                self.commit(step, partial, num_bytes(tensors), also_keep)
        return self.folder / step_name(step)

    def open(self, step: int, tensors: Mapping[str, Tensor]) -> Path | None:
        """A fresh folder with room for `tensors`; None when a good checkpoint of `step` is there already."""
        target = self.folder / step_name(step)
        if self.ranks.from_main(target.exists()) and self.is_good(target):
            return None
        partial = self.folder / f"{PARTIAL_PREFIX}{self.ranks.from_main(secrets.token_hex(8))}"
        self._on_main(lambda: self._make_room(partial, num_bytes(tensors)), num_bytes(tensors))
        return partial

    def write(self, step: int, partial: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Fill `partial`: every rank's part of finite `tensors`, then the manifest, all of it durable."""
        with self.ranks.together():
            check_finite(tensors)
        self._fail_point("before write")
        with self.ranks.together():
            write_shards(partial, tensors, self.ranks)
        self._fail_point("after write")
        manifest = Manifest(
            step=step,
            files=self._hash_written(partial, num_bytes(tensors)),
            tensors=describe_tensors(tensors),
            meta={**meta, **({RUN_KEY: self._run} if self._run else {})},
            versions=dict(self.versions),
            world_size=self.ranks.world_size,
            written=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        self._on_main(lambda: self._seal(partial, manifest), num_bytes(tensors))

    def commit(
        self, step: int, partial: Path, size: int, also_keep: int | None, delete: Callable[[Path], None] = shutil.rmtree
    ) -> None:
        """Make what `write` has filled with `size` bytes of tensors the checkpoint of `step`; `delete` the old ones."""
        target = self.folder / step_name(step)
        self._on_main(lambda: self._commit(partial, target, also_keep, delete), size)
        self._failures = 0

    def tell_undeleted(self, error: StorageError) -> None:
        """What was saved stays saved."""
        self._notice(f"warning: old checkpoints were not deleted: {error}")

    def aside(self) -> CheckpointManager:
        """This manager for another thread, whose messages between the ranks never mix with those of this one."""
        twin = copy(self)
        twin.ranks = Ranks()
        return twin

    @contextmanager
    def discarding(self, partial: Path | None) -> Iterator[None]:
        """Whatever fails inside, `partial` does not stay."""
        try:
            yield
        except BaseException:
            if self.ranks.is_main and partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _make_room(self, partial: Path, size: int) -> None:
        check_space(self.folder, size)
        partial.mkdir()

    def _hash_written(self, partial: Path, size: int) -> dict[str, FileEntry]:
        """Sizes and digests of the files of all ranks; each rank makes its own durable and hashes them."""
        mine: dict[str, list[int | str]] = {}
        with self.ranks.together(), storage_errors(partial, size):
            for path in sorted(partial.glob(shard_pattern(self.ranks.rank))):
                fsync_path(path)
                entry = hash_file(path)
                mine[path.name] = [entry.size, entry.sha256]
        return {name: FileEntry(*entry) for part in self.ranks.gather(mine) for name, entry in part.items()}

    def _seal(self, partial: Path, manifest: Manifest) -> None:
        present = {entry.name for entry in os.scandir(partial)}
        if present != set(manifest.files):
            raise StorageError(f"{partial}: holds {sorted(present)} where {sorted(manifest.files)} were written")
        self._fail_point("before manifest")
        write_manifest(partial, manifest)
        self._fail_point("after manifest")
        fsync_path(partial)

    def _commit(self, partial: Path, target: Path, also_keep: int | None, delete: Callable[[Path], None]) -> None:
        self._ready()
        self._fail_point("before rename")
        self._fence()
        rename_fresh(partial, target)
        self._fail_point("after rename")
        fsync_path(self.folder)
        self._fail_point("after commit")
        try:
            with storage_errors(self.folder):
                self._retire(also_keep, delete)
        except StorageError as error:
            self.tell_undeleted(error)

    def _retire(self, also_keep: int | None, delete: Callable[[Path], None]) -> None:
        """Delete all but the `keep` newest and `also_keep`; each loses its name by one rename before its files go."""
        for path in folders(self.run_dir)[: -self.keep]:
            if folder_step(path) == also_keep:
                continue
            doomed = self.folder / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}"
            path.rename(doomed)
            self._fail_point("while deleting")
            delete(doomed)

    # ---- loading

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose every file is proven; None when this run has never committed one.

        Bad ones are renamed aside, one notice each. Raises CheckpointError when there are only bad ones: a run that
        had state never starts again from nothing by itself. So it does when anyone on the machine may write there.
        """
        self._on_main(self._refuse_open_folders)
        for name in self.ranks.from_main([path.name for path in reversed(folders(self.run_dir))]):
            if self.is_good(self.folder / name):
                return self.folder / name
        if bad := self.ranks.from_main([path.name for path in set_aside(self.run_dir)]):
            raise CheckpointError(
                f"{self.folder}: every checkpoint is bad ({', '.join(bad)}): "
                f"restore one from a copy, or start over in another run.dir"
            )
        return None

    def load(self, path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read the checkpoint at `path` into `tensors` in place and return its `meta`.

        Names, dtypes and global shapes must be the checkpoint's, sharding may differ. Raises CheckpointError naming
        the first bad file or tensor.
        """
        folder = Path(path)
        if folder != self._proven and (found := self._fault(folder)):
            raise CheckpointError(f"{folder}: {found}")
        self._proven = None
        with self.ranks.together():
            manifest = read_manifest(folder)
            check_same(folder, manifest, tensors)
        with self.ranks.together():
            read_shards(folder, tensors, self.ranks)
        return dict(manifest.meta)

    def is_good(self, path: Path) -> bool:
        """Prove `path`; a bad one is renamed aside with a notice."""
        found = self._fault(path)
        if found is None:
            self._proven = path
            return True
        self._on_main(lambda: self._set_aside(path, found))
        return False

    def _fault(self, path: Path) -> str | None:
        """The first fault of a checkpoint, the same on all ranks; each rank hashes its share of the files."""
        found: str | None = None
        if self.ranks.from_main((path / MANIFEST_NAME).exists()):
            wait_to_see(path / MANIFEST_NAME)
        with self.ranks.together():
            try:
                manifest = read_manifest(path)
            except CheckpointError as error:
                found = str(error).removeprefix(f"{path}/")
            else:
                share = sorted(manifest.files)[self.ranks.rank :: self.ranks.world_size]
                found = run_fault(manifest, self._run) or folder_fault(path, manifest)
                found = found or content_fault(path, manifest, share)
        return next((text for text in self.ranks.gather(found) if text is not None), None)

    def _set_aside(self, path: Path, found: str) -> None:
        aside = free_name(path)
        path.rename(aside)
        fsync_path(self.folder)
        self._notice(f"checkpoint of step {folder_step(path)} is bad: {found}; set aside as {aside.name}")

    # ---- shared

    def _on_main(self, action: Callable[[], None], needed_bytes: int = 0) -> None:
        """Run `action` on rank 0; its error, if any, is raised on all ranks."""
        with self.ranks.together():
            if self.ranks.is_main:
                with storage_errors(self.folder, needed_bytes):
                    action()

    def _refuse_open_folders(self) -> None:
        found = None if self._trusts_all or not folders(self.run_dir) else open_to_all(self.run_dir)
        if found is not None:
            raise CheckpointError(
                f"{found}: anyone on this machine may change it, so its sums prove nothing: "
                f"chmod -R o-w {self.run_dir}, or set checkpoint.trust_world_writable=true"
            )

    def _clear_leftovers(self) -> None:
        """Remove what earlier, killed saves left behind; the run's lock says that nobody is writing there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(leftover)
