"""One writer per run folder, and a dead one leaves it free at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_dist.errors import LockedError, StorageError
from sft_dist.resilience.lock import RunLock

HOLD = """
import subprocess, sys, time
from sft_dist.resilience.lock import RunLock
lock = RunLock.acquire(sys.argv[1])
if sys.argv[2] == "with-child":
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fd,))
    print(child.pid, flush=True)
else:
    print("held", flush=True)
time.sleep(60)
"""


def start_holder(run_dir: Path, how: str = "alone") -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_second_is_refused_naming_the_holder(tmp_path: Path) -> None:
    holder, _ = start_holder(tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(LockedError, match=rf"held by process {holder.pid} on .+ since") as error:
            RunLock.acquire(tmp_path, wait_seconds=0.3)
        assert 0.3 <= time.monotonic() - started < 2
        assert error.value.exit_code == 73
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_frees_the_folder_at_once(tmp_path: Path) -> None:
    holder, _ = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunLock.acquire(tmp_path, wait_seconds=0).release()


def test_the_folder_stays_taken_while_a_worker_that_inherited_the_lock_lives(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path, "with-child")
    holder.kill()
    holder.wait()
    with pytest.raises(LockedError):
        RunLock.acquire(tmp_path, wait_seconds=0)
    os.kill(int(child), signal.SIGKILL)
    RunLock.acquire(tmp_path, wait_seconds=5).release()


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path):
        pass
    with RunLock.acquire(tmp_path, wait_seconds=0):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another"):
        RunLock.acquire(tmp_path / "file" / "run")
