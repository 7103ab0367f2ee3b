"""One writer across machines: a live lease refuses, a stale one is taken over, and who lost it is fenced."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from sft_dist.errors import LockedError
from sft_dist.resilience.lease import LEASE_NAME, STALE_SECONDS, Lease, check_ours, read_owner
from sft_dist.resilience.lock import RunLock


def age(run_dir: Path, seconds: float) -> None:
    """Make the last sign of the holder so old."""
    path = run_dir / LEASE_NAME
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_another_machine_is_refused_naming_the_owner(tmp_path: Path) -> None:
    held = Lease.take(tmp_path, machine="one", job="4711")
    words = rf"held by process {os.getpid()} on .+ \(job 4711\) since .+, last sign \d+ s"
    with pytest.raises(LockedError, match=words):
        Lease.take(tmp_path, machine="other")
    check_ours(tmp_path, held.token)


def test_a_stale_lease_is_taken_over_and_its_former_owner_commits_nothing(tmp_path: Path) -> None:
    lost = Lease.take(tmp_path, machine="one")
    age(tmp_path, STALE_SECONDS + 1)
    taken = Lease.take(tmp_path, machine="other")
    check_ours(tmp_path, taken.token)
    with pytest.raises(LockedError, match="taken over by process") as error:
        check_ours(tmp_path, lost.token)
    assert error.value.exit_code == 73
    lost.release()
    check_ours(tmp_path, taken.token)


def test_a_lease_a_second_younger_is_not(tmp_path: Path) -> None:
    Lease.take(tmp_path, machine="one")
    age(tmp_path, STALE_SECONDS - 5)
    with pytest.raises(LockedError):
        Lease.take(tmp_path, machine="other")


def test_one_that_is_released_while_it_is_looked_at_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, touch = Lease.take(tmp_path, machine="one"), Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (held.release(), touch(path)))
    taken = Lease.take(tmp_path, machine="other")
    check_ours(tmp_path, taken.token)


def test_machines_whose_clocks_disagree_agree_on_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lease.take(tmp_path, machine="one")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(LockedError):
        Lease.take(tmp_path, machine="other")


@pytest.mark.parametrize(("machine", "job"), [("one", None), ("other", "4711")], ids=["machine", "requeued-job"])
def test_the_same_machine_and_the_same_job_go_on_at_once(tmp_path: Path, machine: str, job: str | None) -> None:
    lost = Lease.take(tmp_path, machine="one", job="4711")
    taken = Lease.take(tmp_path, machine=machine, job=job)
    assert taken.token != lost.token
    with pytest.raises(LockedError):
        check_ours(tmp_path, lost.token)


def test_a_released_folder_is_free_at_once(tmp_path: Path) -> None:
    Lease.take(tmp_path, machine="one").release()
    assert read_owner(tmp_path) is None
    Lease.take(tmp_path, machine="other")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x"}', "null"])
def test_a_damaged_lease_holds_nobody_up(tmp_path: Path, text: str) -> None:
    (tmp_path / LEASE_NAME).write_text(text)
    check_ours(tmp_path, Lease.take(tmp_path).token)


def test_a_holder_gives_signs_until_it_has_lost(tmp_path: Path) -> None:
    held = Lease.take(tmp_path, machine="one")
    with held.kept(every_seconds=0.01):
        age(tmp_path, 1000)
        deadline = time.monotonic() + 10
        while time.time() - (tmp_path / LEASE_NAME).stat().st_mtime > 100:
            assert time.monotonic() < deadline
        age(tmp_path, 1000)  # a race with the holder's next sign: whoever takes it over is the owner then
        Lease.take(tmp_path, machine="other", stale_seconds=0.0)
        age(tmp_path, 1000)
        for thread in threading.enumerate():
            if thread.name == "lease":
                thread.join(10)
                assert not thread.is_alive()
        assert time.time() - (tmp_path / LEASE_NAME).stat().st_mtime > 100


def test_of_two_that_take_a_stale_lease_at_once_one_owns_it(tmp_path: Path) -> None:
    for _ in range(50):
        Lease.take(tmp_path, machine="gone", stale_seconds=0.0)
        age(tmp_path, STALE_SECONDS + 1)
        tokens: list[str] = []
        start = threading.Barrier(2)

        def race(machine: str, start: threading.Barrier = start, tokens: list[str] = tokens) -> None:
            start.wait()
            try:
                tokens.append(Lease.take(tmp_path, machine=machine).token)
            except LockedError:
                return

        threads = [threading.Thread(target=race, args=(name,)) for name in ("one", "other")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owner = json.loads((tmp_path / LEASE_NAME).read_text())["token"]
        assert owner in tokens
        for token in set(tokens) - {owner}:
            with pytest.raises(LockedError):
                check_ours(tmp_path, token)


def test_the_lock_of_a_run_folder_has_a_lease_and_gives_it_back(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path) as lock:
        check_ours(tmp_path, lock.lease.token)
    assert read_owner(tmp_path) is None


def test_the_lock_is_refused_where_another_machine_holds_the_lease(tmp_path: Path) -> None:
    Lease.take(tmp_path, machine="other")
    with pytest.raises(LockedError, match="last sign"):
        RunLock.acquire(tmp_path)
