"""One writer per run folder: an exclusive `flock` on `RUN_DIR/lock`.

The kernel frees the lock when the last process that holds the open file is gone, so a dead job's folder is free at
once, with no lease to wait for and no stale file to delete. The launcher hands the open file on to its workers: the
folder then stays taken until the last process that could still write into it has ended. The file's text names the
holder, for the message of the one who comes second. Between machines, where `flock` may not be seen, a lease decides
(resilience/lease.py); a held lock has both.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_dist.errors import LockedError, StorageError
from sft_dist.resilience.lease import Lease

LOCK_NAME = "lock"
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.05


class RunLock:
    """A held lock. `fd` may be inherited by children that write into the folder too, `lease.token` fences them."""

    def __init__(self, path: Path, fd: int, lease: Lease) -> None:
        self.path, self.fd, self.lease = path, fd, lease

    @classmethod
    def acquire(cls, run_dir: str | Path, *, wait_seconds: float = WAIT_SECONDS) -> RunLock:
        """Take the folder, trying for `wait_seconds`.

        Raises LockedError naming the holder, StorageError when the folder cannot be written.
        """
        path = Path(run_dir) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"run.dir={run_dir}: cannot be written ({error.strerror}): choose another") from error
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                os.close(fd)
                holder = describe_holder(run_dir)
                raise LockedError(f"run.dir={run_dir}: held by {holder}: wait for it, stop it, or choose another")
            time.sleep(_POLL_SECONDS)
        try:
            lock = cls(path, fd, Lease.take(path.parent))
            lock._sign()
        except OSError as error:
            os.close(fd)
            raise StorageError(f"run.dir={run_dir}: cannot be written ({error.strerror}): choose another") from error
        except LockedError:
            os.close(fd)
            raise
        return lock

    def _sign(self) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, (json.dumps(holder) + "\n").encode(), 0)

    def release(self) -> None:
        """Give the folder back; a child that inherited the file keeps it taken until it ends."""
        if self.fd >= 0:
            with suppress(OSError):  # a lease that cannot be removed ends by itself
                self.lease.release()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe_holder(run_dir: str | Path) -> str:
    """Who signed the lock file last: `process 123 on host since ...`."""
    holder = read_holder(run_dir)
    if not holder:
        return "another job that is just starting"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def read_holder(run_dir: str | Path) -> dict[str, Any]:
    """The holder's host, pid and start; empty while it has not signed yet."""
    try:
        holder = json.loads((Path(run_dir) / LOCK_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
