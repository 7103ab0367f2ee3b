"""A save is struck at each of its system calls in turn: `python syscalls.py FOLDER [--errors] [--limit N]`.

strace attaches to a forked process that has two checkpoints and is about to write the third, and at the n-th call of a
kind either kills it or lets the call fail. n counts up until a save goes through untouched, so no place is left out
and the product needs no hooks. After a kill: the old state or the new one, whole. After an error: the old checkpoints
whole, a message with the bytes needed and free, and the next save works. Prints one line per kind of call.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import torch

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import fault, folder_step

KILLED_AT = ("mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir")
FAILING = ("mkdir", "write", "fsync", "rename", "unlinkat")
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
SAVED, REFUSED = 0, 10
NEEDS_AND_HAS = re.compile(
    r"was not saved: .*cannot be written \(.+\); needs 0\.1 MiB, has [\d.]+ [MG]iB free: make room"
)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((300, 33), float(step)), "optim.w.exp_avg": torch.full((300, 33), -float(step))}


def struck(
    run_dir: Path, calls: str, body: Callable[[CheckpointManager], int], options: tuple[str, ...]
) -> tuple[int, str]:
    """Run `body` in a fork whose system `calls` strace traces with `options`: (return code, what it said)."""
    ready, go = os.pipe(), os.pipe()
    log = run_dir / "said.txt"

    def child() -> int:
        manager = CheckpointManager(run_dir, keep=2, notice=lambda text: said.append(text))
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        code = body(manager)
        os.writev(1, ["".join(said).encode()])  # not the call that fails
        return code

    said: list[str] = []
    process = forked.fork(child, log, kept=(ready[1], go[0]))
    os.read(ready[0], 1)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(process.pid), "-e", f"trace={calls}", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert tracer.stderr is not None
    attached = tracer.stderr.readline()
    assert b"attached" in attached, attached
    os.write(go[1], b"g")
    try:
        code = process.wait(60)
    finally:
        for end in (*ready, *go):
            os.close(end)
        tracer.communicate(timeout=20)
    text = log.read_text()
    log.unlink()
    return code, text


def prepare(folder: Path) -> Path:
    """A run folder with the checkpoints of steps 1 and 2."""
    shutil.rmtree(folder, ignore_errors=True)
    manager = CheckpointManager(folder, keep=2)
    for step in (1, 2):
        manager.save(step, tensors(step), {"step": step})
    return folder


def newest_step(run_dir: Path, set_aside: bool = False) -> int:
    """The step that a reader finds; its tensors are those of that step. All checkpoints there are whole, unless bad
    ones may be `set_aside`."""
    if not set_aside:
        assert [fault(path) for path in folders(run_dir)] == [None] * len(folders(run_dir)), folders(run_dir)
    manager = CheckpointManager(run_dir, keep=2, notice=print if set_aside else refuse)
    newest = manager.newest_good()
    if newest is None:
        return 0
    step = folder_step(newest) or 0
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(step).items()}
    assert manager.load(newest, found) == {"step": step}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(step).items())
    manager.save(9, tensors(9), {"step": 9})  # and the run goes on
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    return step


def refuse(text: str) -> None:
    raise AssertionError(text)


def save_third(manager: CheckpointManager) -> int:
    manager.save(3, tensors(3), {"step": 3})
    return SAVED


def try_third(manager: CheckpointManager) -> int:
    """REFUSED means that it was put up with, and that the save after it worked."""
    if manager.try_save(3, tensors(3), {"step": 3}) is not None:
        return SAVED
    assert manager.try_save(4, tensors(4), {"step": 4}) is not None
    return REFUSED


def kill_at_each(folder: Path, call: str, limit: int) -> str:
    found = []
    for number in itertools.count(1):
        run_dir = prepare(folder / f"{call}-{number}")
        code, _ = struck(run_dir, call, save_third, ("-e", f"inject={call}:signal=SIGKILL:when={number}"))
        step = newest_step(run_dir)
        shutil.rmtree(run_dir)
        if code == SAVED:
            assert step == 3
            break
        assert code == -signal.SIGKILL and step in (2, 3), (call, number, code, step)
        found.append(step)
        if number == limit:
            break
    assert found, f"{call}: nothing was injected"
    return f"killed at {call} 1 to {len(found)}: step 2 {found.count(2)} times, step 3 {found.count(3)} times"


def fail_at_each(folder: Path, call: str, error: str, limit: int) -> str:
    refused = 0
    for number in itertools.count(1):
        run_dir = prepare(folder / f"{call}-{error}-{number}")
        code, said = struck(run_dir, call, try_third, ("-e", f"inject={call}:error={error}:when={number}"))
        where = (call, error, number, code, said)
        assert code in (SAVED, REFUSED), where
        if code == REFUSED:
            assert NEEDS_AND_HAS.search(said), where
            refused += 1
        steps = [folder_step(path) for path in folders(run_dir)]
        assert steps[-1] == (4 if code == REFUSED else 3), (where, steps)
        left = list((run_dir / "checkpoints").glob(".tmp-*"))
        assert not left or call == "unlinkat", (where, left)
        newest_step(run_dir)
        shutil.rmtree(run_dir)
        if (code == SAVED and not said) or number == limit:
            break
    assert refused or call == "unlinkat", f"{call}: nothing was injected"  # what cannot be deleted stays
    return f"{error} at {call} 1 to {number - 1}: refused {refused} times, each with the room, and the next save worked"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="calls of each kind; 0: all of them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for call in KILLED_AT:
        print(kill_at_each(given.folder, call, given.limit), flush=True)
    for call, error in itertools.product(FAILING, ERRORS):
        print(fail_at_each(given.folder, call, error, given.limit), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
