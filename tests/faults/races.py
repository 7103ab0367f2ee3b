"""One writer: `python races.py FOLDER`. Two jobs race for a folder 50 times; a late one is told who holds it; a holder
that was stopped past its lease and taken over from another machine commits and writes nothing more. Prints one line per
case."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
from security import at_step
from tiny_run import lines, write_recipe

from sft_dist import job
from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import fault
from sft_dist.errors import LockedError
from sft_dist.resilience.lease import LEASE_NAME, STALE_SECONDS, Lease
from sft_dist.resilience.run_folder import claim

RACES = 50
WON, LOST = 0, 73


def recipe(folder: Path, name: str) -> Path:
    return write_recipe(
        folder,
        name,
        optim={"max_steps": 12},
        checkpoint={"every_steps": 2},
        eval={"generate": 0, "every_steps": 99},
        resilience={"max_restarts": 0},
    )


def race(folder: Path) -> str:
    """Both claim at the same moment; the winner keeps the folder until the loser has given up."""
    winners = [0, 0]
    for _ in range(RACES):
        start, end = os.pipe(), os.pipe()

        def contender(start: tuple[int, int] = start, end: tuple[int, int] = end) -> int:
            os.close(start[1])
            os.close(end[1])
            os.read(start[0], 1)  # the parent closes its end
            try:
                taken = claim(folder / "run", ["contender"], wait_seconds=0.0)
            except LockedError:
                return LOST
            os.read(end[0], 1)
            taken.lock.release()
            return WON

        both = [forked.fork(contender, folder / "log.txt", kept=(*start, *end)) for _ in range(2)]
        for pipe in (start, end):
            os.close(pipe[0])
        os.close(start[1])
        deadline = time.monotonic() + 20
        while all(one.poll() is None for one in both):
            assert time.monotonic() < deadline, "nobody lost"
            time.sleep(0.001)
        os.close(end[1])
        codes = [one.wait(20) for one in both]
        assert sorted(codes) == [WON, LOST], (codes, (folder / "log.txt").read_text())
        winners[codes.index(WON)] += 1
    attempts = sorted((folder / "run/logs").iterdir())
    assert len(attempts) == RACES
    return f"{RACES} races: one winner each, {winners[0]} and {winners[1]} times"


def late(folder: Path) -> str:
    """The second launcher ends with 73 within ten seconds and a bit, naming the first."""
    path = recipe(folder, "run")
    first = forked.Forked(path, 1, folder / "first.txt", at_step(4, 0, lambda: time.sleep(60)))
    holder = first.start()
    while not lines(folder / "run", "step"):
        time.sleep(0.01)
    started = time.monotonic()
    assert forked.Forked(path, 1, folder / "second.txt").run(30) == LOST
    took = time.monotonic() - started
    said = (folder / "second.txt").read_text()
    assert re.search(rf"held by process {holder.pid} on \S+ since ", said) and took < 12, (took, said)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    return f"the second launcher left with 73 after {took:.1f} s"


def fenced(folder: Path, *, looks_each_step: bool = False) -> str:
    """The launcher and its rank are stopped in step 5 for longer than the lease, and another machine takes over.

    They are not stopped for so long here. So rank 0 finds it at the next commit, or, where it `looks_each_step`, as it
    does after 30 seconds, before it writes a line.
    """
    path, reached = recipe(folder, "run"), folder / "reached"

    def wait_to_be_stopped() -> None:
        reached.write_text(str(os.getpid()))
        while reached.exists():
            time.sleep(0.001)

    def child(rank: int, attempt: int) -> None:
        at_step(5, 0, wait_to_be_stopped)(rank, attempt)
        if looks_each_step:
            job.REFRESH_SECONDS = 0.0

    run = forked.Forked(path, 1, folder / "log.txt", child)
    holder = run.start()
    while not reached.exists() or not reached.read_text():
        time.sleep(0.001)
    pids = [holder.pid, int(reached.read_text())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    lease = folder / "run" / LEASE_NAME
    os.utime(lease, (lease.stat().st_mtime - STALE_SECONDS - 1,) * 2)
    taken = Lease.take(folder / "run", machine="another machine")
    before, written = [path.name for path in folders(folder / "run")], (folder / "run/metrics.jsonl").read_bytes()
    reached.unlink()
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    assert run.wait(60) == LOST, (folder / "log.txt").read_text()
    said = (folder / "log.txt").read_text()
    assert "taken over by process" in said and "Traceback" not in said, said
    assert [path.name for path in folders(folder / "run")] == before and "step-00000002" in before, before
    wrote = (folder / "run/metrics.jsonl").read_bytes() != written
    assert wrote != looks_each_step
    assert all(fault(path) is None for path in folders(folder / "run"))
    taken.release()
    assert forked.Forked(path, 1, folder / "log.txt").run() == 0, (folder / "log.txt").read_text()
    assert len(lines(folder / "run", "step")) == 12
    return f"a holder stopped past its lease committed {'and wrote ' * looks_each_step}nothing and left with 73"


def fenced_before_a_line(folder: Path) -> str:
    """The same, where too long has passed since rank 0 looked."""
    return fenced(folder, looks_each_step=True)


def main(folder: Path) -> int:
    for case in (race, late, fenced, fenced_before_a_line):
        place = folder / case.__name__
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        print(case(place), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
