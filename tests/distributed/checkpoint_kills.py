"""SIGKILL inside a save, at each named point, on one rank of two: `python checkpoint_kills.py FOLDER`.

torch is imported once and every life is a fork. After each kill the survivor is ended too, and a fresh pair of ranks
must find exactly the state before the save or exactly the state after it. Prints one line per case.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manager import FAIL_POINTS, CheckpointManager
from sft_dist.checkpoint.manifest import fault, folder_step

# Which step a reader finds afterwards; the rename is what commits.
COMMITTED = {"after rename", "after commit", "while deleting"}
EVERYWHERE = ("before write", "after write")  # the other points are passed by rank 0 only


def tensors(step: int) -> dict[str, Tensor]:
    return {"model.w": torch.full((1000, 7), float(step)), "optim.w.exp_avg": torch.full((1000, 7), -float(step))}


def life(run_dir: Path, store: Path, rank: int, body: Callable[[Path, int], None]) -> int:
    """Fork one rank that joins a group of two through `store` and runs `body`; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            body(run_dir, rank)
            code = 0
        finally:
            os._exit(code)
    return pid


def pair(run_dir: Path, name: str, body: Callable[[Path, int], None]) -> list[int]:
    """Run two ranks of `body`; when one has died the other is killed. Returns both wait statuses."""
    pids = [life(run_dir, run_dir / f"store-{name}", rank, body) for rank in (0, 1)]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + 30
    while len(statuses) < 2:
        for pid in set(pids) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = status
        if any(statuses.values()) or time.monotonic() > deadline:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def save_first(run_dir: Path, rank: int) -> None:
    manager = CheckpointManager(run_dir, keep=2)
    for step in (1, 2):
        manager.save(step, tensors(step), {"step": step})


def save_and_die(point: str, victim: int) -> Callable[[Path, int], None]:
    def body(run_dir: Path, rank: int) -> None:
        def fail_point(name: str) -> None:
            if (name, rank) == (point, victim):
                os.kill(os.getpid(), signal.SIGKILL)

        CheckpointManager(run_dir, keep=2, fail_point=fail_point).save(3, tensors(3), {"step": 3})

    return body


def expect_step(expected: int) -> Callable[[Path, int], None]:
    def body(run_dir: Path, rank: int) -> None:
        def unexpected(text: str) -> None:
            raise AssertionError(text)

        manager = CheckpointManager(run_dir, keep=2, notice=unexpected)
        newest = manager.newest_good()
        assert newest is not None and folder_step(newest) == expected, newest
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
        assert manager.load(newest, found) == {"step": expected}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(expected).items())
        manager.save(4, tensors(4), {"step": 4})  # and the run goes on
        assert not list((run_dir / "checkpoints").glob(".tmp-*"))

    return body


if __name__ == "__main__":
    for point in FAIL_POINTS:
        for victim in (0, 1) if point in EVERYWHERE else (0,):
            run_dir = Path(sys.argv[1]) / f"{point}-{victim}".replace(" ", "-")
            run_dir.mkdir()
            assert pair(run_dir, "first", save_first) == [0, 0]
            statuses = pair(run_dir, "killed", save_and_die(point, victim))
            assert statuses[victim] == signal.SIGKILL, (point, statuses)
            assert all(fault(path) is None for path in folders(run_dir)), point
            assert pair(run_dir, "after", expect_step(3 if point in COMMITTED else 2)) == [0, 0], point
            print(f"killed rank {victim} {point}: found step {3 if point in COMMITTED else 2}", flush=True)
