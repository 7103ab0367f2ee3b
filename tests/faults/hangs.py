"""A rank that no longer moves, in every way it can: `python hangs.py FOLDER [CASE ...]`.

Two ranks of a real run; rank 1 meets its fate in step 5, T is 3 seconds. A hang must be found and the stacks of both
ranks be written within T + 5 s, the odd rank named, the place where it is shown unless it is stopped, and all be dead
within 10 s more with 71. A crash in native code
must end the run at once. Afterwards the same command ends with the bits of the run that was left alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forked
import torch
import torch.distributed as dist
from tiny_run import trajectory, weights, write_recipe

from sft_dist.data.loader import Loader
from sft_dist.resilience.heartbeat import Heart

T_SECONDS, FOUND_SECONDS, DEAD_SECONDS = 3.0, 5.0, 10.0
STEP = 5


def recipe(folder: Path, name: str) -> Path:
    return write_recipe(
        folder,
        name,
        optim={"max_steps": 12},
        checkpoint={"every_steps": 4},
        eval={"generate": 0, "every_steps": 99},
        resilience={"max_restarts": 0, "hang_seconds": T_SECONDS},
    )


def fall_asleep() -> None:
    time.sleep(600)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)


def join_another_collective() -> None:
    dist.broadcast(torch.zeros(3), src=1)
    dist.barrier()
    time.sleep(600)


def crash() -> None:
    ctypes.string_at(0)


HANGS: dict[str, Callable[[], None]] = {
    "asleep": fall_asleep,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "holds the interpreter": hold_the_interpreter,
    "in another collective": join_another_collective,
}
READER = "stuck reader"
SHOWN = {  # what the stacks of rank 1 have to show
    "asleep": " in fall_asleep",
    "stopped": "no answer: the process was stopped, or stuck in the kernel",
    "holds the interpreter": " in hold_the_interpreter",
    "in another collective": " in join_another_collective",
    READER: " in step_or_wait",
}
CRASHES: dict[str, Callable[[], None]] = {"segmentation fault": crash, "abort": os.abort}


def meet(fate: Callable[[], None], when: Path, rank: int, attempt: int) -> None:
    if rank != 1 or attempt > 1:
        return
    beat = Heart.beat

    def beat_and_meet(heart: Heart, step: int, phase: str) -> None:
        beat(heart, step, phase)
        if (step, phase) == (STEP, "train"):
            when.write_text(str(time.time()))  # files carry this clock
            fate()

    Heart.beat = beat_and_meet  # type: ignore[method-assign]


def stick_the_reader(fifo: Path, when: Path, rank: int, attempt: int) -> None:
    """The thread that reads the data ahead waits for a file that nobody writes."""
    if rank != 1 or attempt > 1:
        return
    step = Loader.step

    def step_or_wait(loader: Loader, number: int):  # type: ignore[no-untyped-def]
        if number == STEP:
            when.write_text(str(time.time()))
            fifo.open("rb").read()
        return step(loader, number)

    Loader.step = step_or_wait  # type: ignore[method-assign]


def run_case(folder: Path, name: str, before: Callable[[int, int], None], is_hang: bool) -> str:
    place, when = folder / name.replace(" ", "-"), folder / "when"
    path, log = recipe(folder, place.name), folder / f"{place.name}.txt"
    code = forked.Forked(path, 2, log, before).run(60)
    began = float(when.read_text())
    took = time.time() - began
    text = log.read_text()
    if is_hang:
        assert code == 71, (name, code, text)
        files = [place / f"logs/attempt_0001/rank_{rank:05d}.stacks.txt" for rank in range(2)]
        written = max(file.stat().st_mtime for file in files) - began
        assert T_SECONDS < written < T_SECONDS + FOUND_SECONDS, (name, written)
        assert written < took < written + DEAD_SECONDS, (name, written, took)
        odd = "rank 1: step 5" if name == "in another collective" else "odd one out is rank 1: "  # of two: either is
        assert odd in text, (name, text)
        assert name != "stopped" or "rank 1: step 5, train, gave no stack" in text, text
        waiting, held = (file.read_text() for file in files)
        assert " in train_step" in waiting, (name, waiting)
        assert SHOWN[name] in held, (name, held)
    else:
        assert code == 1 and took < DEAD_SECONDS, (name, code, took, text)
        assert "rank 1 of 2 died of SIG" in text, (name, text)
    assert forked.Forked(path, 2, log).run(120) == 0, log.read_text()
    assert trajectory(place) == trajectory(folder / "straight"), name
    assert weights(place) == weights(folder / "straight"), name
    return f"{name}: {code} after {took:.1f} s, the same bits afterwards"


def main(folder: Path, names: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    assert forked.Forked(recipe(folder, "straight"), 2, folder / "straight.txt").run() == 0
    when = folder / "when"
    for fates, is_hang in ((HANGS, True), (CRASHES, False)):
        for name, fate in fates.items():
            if not names or name in names:
                print(run_case(folder, name, partial(meet, fate, when), is_hang), flush=True)
    if not names or READER in names:
        os.mkfifo(folder / "fifo")
        print(run_case(folder, READER, partial(stick_the_reader, folder / "fifo", when), True), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
