"""A folder that is either complete or not there: written beside its place, flushed, then renamed.

with atomic_folder(Path("cache/abc")) as folder:      # works in cache/.tmp-abc-1f3c...
    (folder / "meta.json").write_text("{}")
# here cache/abc exists, on disk; on any error, or a kill at any moment, it does not
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sft_dist.errors import StorageError

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
_FORGOTTEN_SECONDS = 24 * 3600  # a shard is written in milliseconds


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` when the block ends without an error.

    Raises StorageError when the disk is full, read-only or gone, or when `final` exists already.
    """
    temporary = final.parent / f".tmp-{final.name}-{secrets.token_hex(8)}"
    with _storage_errors(final):
        temporary.mkdir(parents=True)
    try:
        with _storage_errors(final, only=_DISK_ERRORS):  # the block may meet other errors: a source without permission
            yield temporary
        with _storage_errors(final):
            _sync_tree(temporary)
            os.rename(temporary, final)
            sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(final: Path) -> None:
    """Remove what killed writers of `final` left behind. Only for who holds the lock that guards `final`."""
    for leftover in final.parent.glob(f".tmp-{final.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_forgotten(root: Path) -> None:
    """Remove the temporary files that killed writers left in the folders of `root`, where no lock tells whose they are:
    those that nobody has written to for a day."""
    for leftover in root.glob("*/.tmp-*"):
        with suppress(OSError):  # another process removed it, or finishes it after all
            if leftover.stat().st_mtime < time.time() - _FORGOTTEN_SECONDS:
                leftover.unlink()


def sync(path: str | Path) -> None:
    """Flush one file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)


@contextmanager
def _storage_errors(final: Path, only: frozenset[int] | None = None) -> Iterator[None]:
    """Turn the operating system's errors (those numbers in `only`) into a StorageError about `final`."""
    try:
        yield
    except OSError as error:
        if only is None or error.errno in only:
            raise StorageError(f"{final}: cannot be written ({error}); free space or choose another folder") from error
        raise
