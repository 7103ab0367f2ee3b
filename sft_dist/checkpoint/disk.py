"""File system steps of the commit protocol: durable, named errors, never onto an existing name. Imports no torch."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sft_dist.errors import StorageError

# What a full, failing, read-only or vanished file system answers.
STORAGE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENODEV, errno.ENXIO}
)
VISIBLE_SECONDS = 120.0  # for what one machine has renamed to be seen by the others of a shared file system
SPACE_MARGIN = 1.1  # free space wanted, as a multiple of the data's bytes


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise StorageError when the file system of `folder` has less than 1.1 x `num_bytes` free."""
    needed, free = int(num_bytes * SPACE_MARGIN), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder}: needs {gib(needed)}, has {gib(free)} free: make room or move run.dir")


def rename_fresh(source: Path, target: Path) -> None:
    """Rename a folder to a name that does not exist yet."""
    if target.exists():
        raise StorageError(f"{target}: exists already and is never overwritten")
    source.rename(target)


def wait_to_see(path: Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Until `path`, which another machine sees, is seen here too, or VISIBLE_SECONDS are over. Looking into its folders
    makes the clients of network file systems ask the server again."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        for folder in (path.parent.parent, path.parent):
            with suppress(OSError):
                os.listdir(folder)
        pause(0.2)


def free_name(path: Path) -> Path:
    """`path.bad-1`, or the next number that is free."""
    number = 1
    while (aside := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    return aside


@contextmanager
def storage_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """An OSError inside becomes a StorageError that names the place, what was to be written and how much room there is.

    Connections are no storage: their errors pass.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise explain(path, error, needed_bytes) from error


def explain(path: Path, error: OSError, needed_bytes: int = 0) -> StorageError:
    """One line: where, what the system said, what was to be written and the room left there."""
    needs = f"needs {gib(needed_bytes)}, has " if needed_bytes else ""
    reason = error.strerror or str(error)
    return StorageError(f"{path}: cannot be written ({reason}); {needs}{_room(path)} free: make room or move run.dir")


def is_storage_failure(error: OSError) -> bool:
    """Whether the file system failed, rather than the program asking for something that is not there."""
    return error.errno in STORAGE_ERRNOS


def _room(path: Path) -> str:
    """Free space where `path` is or was to be; a file system that fails may not even say that."""
    try:
        existing = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
        return gib(shutil.disk_usage(existing).free)
    except OSError:
        return "unknown room"


def gib(num_bytes: int) -> str:
    """Bytes for people: `1.50 GiB`, or `12.3 MiB` below a gibibyte."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
