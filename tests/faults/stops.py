"""Every signal to every process of a real run in every phase: `python stops.py FOLDER [--seed 1 --cells 16]`.

{SIGTERM, SIGUSR1, SIGINT, SIGKILL} x {launcher, rank 0, rank 1, all} x {prepare, train, save, evaluate}, two ranks.
Rank 0 sends the signal when it enters the phase. Then: the exit code is the promised one, no process is left, the
folder is free, and the same command ends with the bits of the run that was left alone. Without --cells all 64 are run,
else a seeded choice. Prints one line per cell.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked
from tiny_run import trajectory, weights, write_recipe

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import folder_step
from sft_dist.launch.requeue import left_in_time
from sft_dist.launch.stops import TWICE_SECONDS
from sft_dist.resilience import unsaved
from sft_dist.resilience.heartbeat import Heart
from sft_dist.resilience.lock import RunLock

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL)
TARGETS = ("launcher", "rank 0", "rank 1", "all")
PHASES = {"prepare": 1, "train": 3, "save": 1, "evaluate": 2}  # at the how-many-th time; before step 0 is an evaluation
SECONDS = 30  # one step, one save, and the start of a process


def expected(number: signal.Signals, target: str, phase: str) -> set[int]:
    """The exit codes that the launcher may leave with."""
    if number == signal.SIGKILL:
        return {-signal.SIGKILL} if target in ("launcher", "all") else {1}
    if number == signal.SIGINT and (phase == "prepare" or target == "all"):
        return {1, 75}  # nobody listens yet; or the ranks get it twice, from us and from the launcher: that aborts
    return {75}


def recipe(folder: Path, name: str) -> Path:
    return write_recipe(
        folder,
        name,
        optim={"max_steps": 12},
        checkpoint={"every_steps": 4, "async": True},
        eval={"generate": 0, "every_steps": 6},
        resilience={"max_restarts": 0},
    )


def strike(folder: Path, number: signal.Signals, target: str, phase: str, times: int, rank: int, attempt: int) -> None:
    """Rank 0: send the signal on entering `phase`; every rank leaves its process id."""
    partial = folder / f".pid-{rank}"
    partial.write_text(str(os.getpid()))
    partial.replace(folder / f"pid-{rank}")  # never seen empty
    if rank or attempt > 1:
        return
    beat, count = Heart.beat, itertools.count(1)

    def beat_and_send(heart: Heart, step: int, now: str) -> None:
        beat(heart, step, now)
        if now == phase and next(count) == PHASES[phase]:
            while not (folder / "pid-1").exists():
                time.sleep(0.001)
            pids = {f"rank {r}": int((folder / f"pid-{r}").read_text()) for r in (1, 0)}
            pids = {"launcher": os.getppid(), **pids}  # ourselves last
            for turn in range(times):
                time.sleep(turn * 1.2 * TWICE_SECONDS)  # sooner, it would count as the same Ctrl-C
                arrived = signal.getsignal(number)  # two SIGINTs that wait together are one
                for name, pid in pids.items():
                    if target in (name, "all"):
                        os.kill(pid, number)
                while times > 1 and signal.getsignal(number) == arrived:
                    time.sleep(0.001)

    Heart.beat = beat_and_send  # type: ignore[method-assign]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def run_cell(
    folder: Path, straight: Path, number: signal.Signals, target: str, phase: str, codes: set[int], times: int = 1
) -> str:
    name = f"{number.name}-{target}-{phase}-{times}".replace(" ", "")
    place = folder / name
    path = recipe(place, "run")
    log = place / "log.txt"
    started = time.monotonic()
    code = forked.Forked(path, 2, log, partial(strike, place, number, target, phase, times)).run(SECONDS)
    seconds = time.monotonic() - started
    text = log.read_text()
    assert code in codes, f"{name}: exit code {code}, expected {sorted(codes)}\n{text}"
    deadline = time.monotonic() + 5
    while not all(is_gone(int((place / f"pid-{rank}").read_text())) for rank in (0, 1)):
        assert time.monotonic() < deadline, f"{name}: a rank is left"
        time.sleep(0.01)
    RunLock.acquire(place / "run", wait_seconds=5).release()  # threads of a killed process take a moment to go
    assert forked.Forked(path, 2, log).run(120) == 0, log.read_text()
    assert trajectory(place / "run") == trajectory(straight), name
    assert weights(place / "run") == weights(straight), name
    shutil.rmtree(place)
    return f"{number.name} x {times} to {target} in {phase}: {code} after {seconds:.1f} s, the same bits"


def time_limit(folder: Path) -> str:
    """The job's end is near from the start: one step, a checkpoint, 75; without a limit the same command goes on."""
    path, log = recipe(folder, "limit"), folder / "limit.txt"
    settings = [f"resilience.end_time={time.time() + 60}", "resilience.end_margin_seconds=60"]
    assert forked.Forked(path, 2, log, settings=settings).run(SECONDS) == 75, log.read_text()
    assert left_in_time(folder / "limit", 1, None)  # so that a scheduler starts it again
    assert "(the time limit is near)" in log.read_text() and len(trajectory(folder / "limit")) == 1, log.read_text()
    assert forked.Forked(path, 2, log).run() == 0, log.read_text()
    assert trajectory(folder / "limit") == trajectory(folder / "straight")
    return "a time limit that nobody signals: 75, the same bits"


def by_clock(folder: Path) -> str:
    """Automatic saves come by the clock: here, where every moment is worth one, behind each step."""

    def at_once(rank: int, attempt: int) -> None:
        unsaved.SHORTEST_SECONDS, unsaved.SAVES_APART = 0.0, 0

    path, log = recipe(folder, "clock"), folder / "clock.txt"
    settings = ["checkpoint.every_steps=auto", "checkpoint.keep=99"]
    assert forked.Forked(path, 2, log, at_once, settings).run(SECONDS) == 0, log.read_text()
    assert [folder_step(path) for path in folders(folder / "clock")] == list(range(1, 13))
    assert trajectory(folder / "clock") == trajectory(folder / "straight")
    return "a save whenever enough time has passed: the same bits"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", type=int)
    given = parser.parse_args()
    straight = recipe(given.folder, "straight")
    assert forked.Forked(straight, 2, given.folder / "straight.txt").run() == 0
    cells = list(itertools.product(SIGNALS, TARGETS, PHASES))
    if given.cells is not None:
        cells = latin(random.Random(given.seed))[: given.cells]
    for cell in cells:
        print(run_cell(given.folder, given.folder / "straight", *cell, expected(*cell)), flush=True)
    for limit in (time_limit, by_clock):
        print(limit(given.folder), flush=True)
    twice = (signal.SIGINT, "launcher", "train")
    print(run_cell(given.folder, given.folder / "straight", *twice, {1}, times=2), flush=True)
    return 0


def latin(source: random.Random) -> list[tuple[signal.Signals, str, str]]:
    """Sixteen cells with every pair of signal and target, signal and phase, target and phase once."""
    signals, targets, phases = (source.sample(list(x), 4) for x in (SIGNALS, TARGETS, PHASES))
    square = [(signals[i], targets[j], phases[(i + j) % 4]) for i in range(4) for j in range(4)]
    return source.sample(square, len(square))


if __name__ == "__main__":
    sys.exit(main())
