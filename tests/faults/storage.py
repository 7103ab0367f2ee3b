"""A disk that is full or fails under a real two-rank run: `python storage.py FOLDER`.

The run folder lies on a small file system of its own. `fill` takes the last byte of it at a chosen step, `relieve`
gives the room back. Prints one line per case.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forked
from tiny_run import lines, trajectory, weights, write_recipe

from sft_dist import milestones, train
from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import fault, folder_step

ROOM = "4m"
STEPS, EVERY_STEPS = 12, 2


def recipe(folder: Path, name: str) -> Path:
    return write_recipe(
        folder,
        name,
        parallel={"strategy": "fsdp2"},
        optim={"max_steps": STEPS},
        checkpoint={"every_steps": EVERY_STEPS, "async": False},  # so that a fault hits the save it is meant for
        eval={"generate": 0, "every_steps": 99},
        resilience={"max_restarts": 0},
    )


def fill(run_dir: Path) -> None:
    """Take all the room that is left."""
    with (run_dir / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def relieve(run_dir: Path) -> None:
    (run_dir / "filler").unlink(missing_ok=True)


Plan = dict[int, Callable[[], None]]


def at_saves(before: Plan, inside: Plan, rank: int, attempt: int) -> None:
    """Run `before[step]` on rank 0 before the save of that step begins, `inside[step]` once it has checked the room."""
    if rank or attempt > 1:
        return
    save, current = milestones.save, [0]

    def save_with_fault(parts, manager, position, run_dir, **options) -> None:  # type: ignore[no-untyped-def]
        current[0] = position.step
        before.get(position.step, lambda: None)()
        save(parts, manager, position, run_dir, **options)

    def point(name: str) -> None:
        if name == "before write":
            inside.get(current[0], lambda: None)()

    milestones.save = save_with_fault
    train.CheckpointManager = partial(CheckpointManager, fail_point=point)  # type: ignore[misc, assignment]


def prove(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, all of them good, with nothing half-written beside them."""
    assert all(fault(path) is None for path in folders(run_dir))
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    return [folder_step(path) or 0 for path in folders(run_dir)]


def compare(folder: Path, name: str) -> None:
    assert trajectory(folder / name) == trajectory(folder / "straight"), name
    assert weights(folder / name) == weights(folder / "straight"), name


def passing(folder: Path, log: Path, *, inside: bool) -> None:
    """Full for two saves, then relieved: the run ends in order, having told of both."""
    run_dir = folder / log.stem
    filling, relieving = {4: partial(fill, run_dir)}, {8: partial(relieve, run_dir)}
    plans = (relieving, filling) if inside else (filling | relieving, {})
    code = forked.Forked(recipe(folder, log.stem), 2, log, partial(at_saves, *plans)).run()
    text = log.read_text()
    assert code == 0, text
    said = [line for line in text.splitlines() if "was not saved" in line]
    assert [line.split("warning: ")[1].split(" was")[0] for line in said] == ["step 4", "step 6"], text
    assert all("needs 0.3 MiB, has 0.0 MiB free" in line for line in said), said
    assert prove(run_dir) == [10, 12]
    compare(folder, log.stem)


def lasting(folder: Path, log: Path) -> None:
    """Full for good: 74 after three saves, the older checkpoints good, and the run goes on once there is room."""
    run_dir = folder / log.stem
    code = forked.Forked(recipe(folder, log.stem), 2, log, partial(at_saves, {6: partial(fill, run_dir)}, {})).run()
    text = log.read_text()
    assert code == 74, (code, text)
    assert "(3 saves in a row have failed)" in text and "Traceback" not in text, text
    assert prove(run_dir) == [2, 4] and len(lines(run_dir, "step")) < STEPS
    relieve(run_dir)
    assert forked.Forked(recipe(folder, log.stem), 2, log).run() == 0, log.read_text()
    assert "resuming after step 4" in log.read_text()
    compare(folder, log.stem)


def last_save(folder: Path, log: Path) -> None:
    """The last save may not fail: no `done` without a checkpoint, but 74 at once."""
    run_dir = folder / log.stem
    before = partial(at_saves, {STEPS: partial(fill, run_dir)}, {})
    code = forked.Forked(recipe(folder, log.stem), 2, log, before).run()
    assert code == 74 and not (run_dir / "summary.json").exists(), log.read_text()
    assert prove(run_dir) == [8, 10]
    relieve(run_dir)
    assert forked.Forked(recipe(folder, log.stem), 2, log).run() == 0, log.read_text()
    compare(folder, log.stem)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    straight = forked.Forked(recipe(folder, "straight"), 2, folder / "straight.txt")
    assert straight.run() == 0, (folder / "straight.txt").read_text()
    cases: dict[str, Callable[[Path, Path], None]] = {
        "full-before": partial(passing, inside=False),
        "full-inside": partial(passing, inside=True),
        "full-for-good": lasting,
        "full-at-the-end": last_save,
    }
    for name, case in cases.items():
        run_dir = folder / name
        run_dir.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(run_dir)], check=True)
        try:
            case(folder, folder / f"{name}.txt")
        finally:
            subprocess.run(["umount", "-l", str(run_dir)], check=True)
        print(f"{name}: as promised", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
