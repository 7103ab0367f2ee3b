"""One writer across machines: `RUN_DIR/lease.json` says who owns the folder, and a token fences who lost it.

    {"token": "5f...", "machine": "<boot id>", "host": "node7", "pid": 123, "job": "4711", "since": "..."}

`flock` decides between processes of one kernel and frees a dead holder's folder at once; on several machines it may
not be seen. There the lease decides. Its holder touches the file every 30 seconds; one that was not touched for five
minutes may be taken over with a new token. Who took too long (a stopped process, a cut network) still believes it owns
the folder: so the token is read again right before each commit, and before a line is written where it was not read for
30 seconds; a writer with an old one ends with 73 instead.

Age is the difference of two modification times on that file system, so machines need not agree on the time.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from sft_dist.errors import LockedError

LEASE_NAME = "lease.json"
LEASE_VARIABLE = "SFT_LEASE"  # the token, for workers
STALE_SECONDS = 300.0
REFRESH_SECONDS = 30.0


@cache
def this_machine() -> str:
    """The running kernel's boot id: host names repeat in containers, and a rebooted machine holds nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True, slots=True)
class Owner:
    """What a lease file says."""

    token: str
    machine: str
    host: str
    pid: int
    job: str | None  # of the scheduler; a requeued job keeps its number
    since: str

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class Lease:
    """A folder that is ours as long as its lease file has our token."""

    def __init__(self, run_dir: Path, owner: Owner) -> None:
        self.path, self.owner = run_dir / LEASE_NAME, owner

    @property
    def token(self) -> str:
        return self.owner.token

    @classmethod
    def take(
        cls,
        run_dir: str | Path,
        *,
        machine: str | None = None,
        job: str | None = None,
        stale_seconds: float = STALE_SECONDS,
    ) -> Lease:
        """Own the existing folder `run_dir`. On this machine hold its `flock` first; that one decides here.

        Raises LockedError naming the owner when another machine holds it and has given a sign within `stale_seconds`.
        """
        path, machine = Path(run_dir) / LEASE_NAME, machine or this_machine()
        job = job or os.environ.get("SLURM_JOB_ID")
        other = read_owner(run_dir)
        if other is not None and other.machine != machine and not (job and other.job == job):
            silent = _age_seconds(path)
            if silent < stale_seconds:
                raise LockedError(
                    f"run.dir={run_dir}: held by {other}, last sign {silent:.0f} s ago (free {stale_seconds:.0f} s "
                    f"after it): wait for it, stop it, or choose another"
                )
        lease = cls(
            Path(run_dir),
            Owner(
                secrets.token_hex(16),
                machine,
                socket.gethostname(),
                os.getpid(),
                job,
                time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            ),
        )
        lease._write()
        return lease

    def _write(self) -> None:
        partial = self.path.with_name(f".{LEASE_NAME}.{self.token}")
        partial.write_text(json.dumps(asdict(self.owner)) + "\n")
        partial.replace(self.path)
        check_ours(self.path.parent, self.token)  # two machines may take a stale one over at once: the later wins

    @contextmanager
    def kept(self, every_seconds: float = REFRESH_SECONDS) -> Iterator[None]:
        """Give signs in a thread meanwhile. Fork nothing inside."""
        left = threading.Event()
        thread = threading.Thread(target=self._refresh, args=(left, every_seconds), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join(1.0)

    def _refresh(self, left: threading.Event, every_seconds: float) -> None:
        while not left.wait(every_seconds):
            owner = read_owner(self.path.parent)
            if owner is None or owner.token != self.token:
                return  # rank 0 finds it by itself
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Leave the folder to the next one at once; a lease that is no longer ours stays."""
        owner = read_owner(self.path.parent)
        if owner is not None and owner.token == self.token:
            self.path.unlink(missing_ok=True)


def check_ours(run_dir: str | Path, token: str) -> None:
    """Raise LockedError, naming the new owner, when the folder's lease has another token by now."""
    owner = read_owner(run_dir)
    if owner is None or owner.token != token:
        now = f"taken over by {owner}" if owner else "given up"
        raise LockedError(f"run.dir={run_dir}: was {now}: this process had lost it and commits nothing")


def read_owner(run_dir: str | Path) -> Owner | None:
    """Who holds the folder; None when nobody does, or the file is no lease."""
    try:
        return Owner(**json.loads((Path(run_dir) / LEASE_NAME).read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _age_seconds(path: Path) -> float:
    """How long ago the file was touched, by the clock of the file system itself; for ever, where it has gone since."""
    probe = path.with_name(f".{LEASE_NAME}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    finally:
        probe.unlink(missing_ok=True)
