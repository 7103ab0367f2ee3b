"""The run folder as a job claims it: lock, attempt number, and the small files of `logs/attempt_0001/`.

Whoever starts a run claims the folder once: the local launcher, or rank 0 under torchrun, accelerate and deepspeed.
A claim takes the lock, clears a `stop` file that an earlier attempt has obeyed, and makes the next attempt's folder.
A restart by the launcher is a further attempt under the same lock.

    logs/attempt_0001/command.txt            how it was started
    logs/attempt_0001/events.jsonl           one line per event: start, hang, end, restart
    logs/attempt_0001/rank_00000.stacks.txt  Python stacks of each rank, after a hang
    logs/attempt_0001/exit_code              written by the worker when it ends in order; launchers translate it
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sft_dist.errors import StorageError
from sft_dist.resilience.lock import WAIT_SECONDS, RunLock

EXIT_CODE_VARIABLE = "SFT_EXIT_CODE_FILE"  # where launchers of ours wait for the code: worker.sh knows no run folder
RESULT_VARIABLE = "SFT_RESULT_FILE"  # where a scheduler's script looks for it, on a file system that all nodes share
STOP_NAME = "stop"
BEGUN_ANEW_NAME = "begun_anew"
RESULTS = (  # of attempts; the checkpoints go last, so that a half-moved run still has its state
    "summary.json",
    "export",
    "report.html",
    "report",
    "metrics.jsonl",
    "samples.jsonl",
    "exact_match.jsonl",
    "tensorboard",
    "trackers.json",
    "wandb",
    "mlflow",
    "fingerprint.json",
    "checkpoints",
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A run folder that is ours until `lock` is released."""

    run_dir: Path
    attempt: int  # 1-based
    lock: RunLock

    @property
    def attempt_dir(self) -> Path:
        return attempt_dir(self.run_dir, self.attempt)


def claim(run_dir: str | Path, command: Sequence[str], *, wait_seconds: float = WAIT_SECONDS) -> Claim:
    """Take the folder for a new attempt started by `command`.

    Raises LockedError (73) when another live job holds it, StorageError (74) when it cannot be written.
    """
    lock = RunLock.acquire(run_dir, wait_seconds=wait_seconds)
    try:
        with _storage_errors(run_dir):
            (Path(run_dir) / STOP_NAME).unlink(missing_ok=True)
        return next_attempt(run_dir, command, lock)
    except BaseException:
        lock.release()
        raise


def next_attempt(run_dir: str | Path, command: Sequence[str], lock: RunLock) -> Claim:
    """Make the folder of the attempt after the last one, under a `lock` that is held already."""
    taken = Claim(Path(run_dir), last_attempt(run_dir) + 1, lock)
    with _storage_errors(run_dir):
        taken.attempt_dir.mkdir(parents=True)
        (taken.attempt_dir / "command.txt").write_text(shlex.join(command) + "\n")
    return taken


@contextmanager
def _storage_errors(run_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"run.dir={run_dir}: cannot be written ({error.strerror}): choose another") from error


def attempt_dir(run_dir: str | Path, attempt: int) -> Path:
    """`RUN_DIR/logs/attempt_0001` for attempt 1."""
    return Path(run_dir) / "logs" / f"attempt_{attempt:04d}"


def last_attempt(run_dir: str | Path) -> int:
    """Number of the newest attempt, 0 before the first."""
    names = [path.name for path in (Path(run_dir) / "logs").glob("attempt_*")]
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"attempt_(\d+)", name))), default=0)


def put_aside(run_dir: str | Path, attempt: int) -> Path | None:
    """Move what earlier attempts left to `RUN_DIR/earlier/before_attempt_0003`, so that this one starts anew.

    Logs stay where they are, with a word for `has_begun_anew`. Returns the folder; None when there was nothing.
    """
    left = [Path(run_dir) / name for name in RESULTS if (Path(run_dir) / name).exists()]
    aside = Path(run_dir) / "earlier" / f"before_attempt_{attempt:04d}"
    for path in left:
        aside.mkdir(parents=True, exist_ok=True)
        path.rename(aside / path.name)
    (attempt_dir(run_dir, attempt) / BEGUN_ANEW_NAME).touch()
    return aside if left else None


def has_begun_anew(taken: Claim) -> bool:
    """Whether this attempt has put earlier ones aside: what is in the folder since then is its own."""
    return (taken.attempt_dir / BEGUN_ANEW_NAME).exists()


def write_exit_code(folder: str | Path | None, code: int) -> None:
    """Say how this attempt ended, in `folder` and where worker.sh waits for it. Call it last, on rank 0.

    `folder` is None when the run ended before it had one.
    """
    named = [os.environ[name] for name in (EXIT_CODE_VARIABLE, RESULT_VARIABLE) if os.environ.get(name)]
    places = {Path(place).absolute() for place in (Path(folder) / "exit_code" if folder else None, *named) if place}
    for path in places:
        # a name of its own: after a hang every node writes here, at nearly the same time
        partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(f"{code}\n")
            partial.replace(path)
        except OSError as error:  # our launcher then goes by the process's own code
            print(f"sft-dist: warning: {path}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def read_exit_code(folder: str | Path) -> int | None:
    """The code an attempt ended with; None while it has not ended in order."""
    try:
        return int((Path(folder) / "exit_code").read_text())
    except (OSError, ValueError):
        return None


def append_event(folder: str | Path, event: str, **fields: object) -> None:
    """Add one line to `events.jsonl`; the time is for people, nothing is ordered by it.

    A full disk costs the line, said on stderr, and not the run.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    path = Path(folder) / "events.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print(f"sft-dist: warning: {path}: cannot be written ({error.strerror}): {line}", file=sys.stderr, flush=True)
