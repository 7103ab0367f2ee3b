"""File system steps of the commit protocol: durable, named errors, never onto an existing name. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_dist.errors import StorageError

SPACE_MARGIN = 1.1  # free space wanted, as a multiple of the data's bytes


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise StorageError when the file system of `folder` has less than 1.1 x `num_bytes` free."""
    needed, free = int(num_bytes * SPACE_MARGIN), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder}: needs {gib(needed)}, has {gib(free)} free: make room or move run.dir")


def fsync_path(path: Path) -> None:
    """Bring a file's or folder's data to the device; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_fresh(source: Path, target: Path) -> None:
    """Rename a folder to a name that does not exist yet."""
    if target.exists():
        raise StorageError(f"{target}: exists already and is never overwritten")
    source.rename(target)


def free_name(path: Path) -> Path:
    """`path.bad-1`, or the next number that is free."""
    number = 1
    while (aside := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    return aside


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """An OSError inside becomes a StorageError that names the place and how much room there is."""
    try:
        yield
    except OSError as error:
        raise explain(path, error) from error


def explain(path: Path, error: OSError) -> StorageError:
    """One line: where, what the system said, and the room left there."""
    existing = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    room = gib(shutil.disk_usage(existing).free)
    reason = error.strerror or str(error)
    return StorageError(f"{path}: cannot be written ({reason}); {room} free: make room or move run.dir")


def gib(num_bytes: int) -> str:
    """Bytes for people: `1.50 GiB`, or `12.3 MiB` below a gibibyte."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
