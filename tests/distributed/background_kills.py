"""SIGKILL while a checkpoint is being written in the background: `python background_kills.py FOLDER`.

A real run on two FSDP2 ranks saves every second step. In each life one rank dies at a point of the third save, in its
writing thread or in the commit on the main path, some steps later; the other rank is ended, and the same command is
given again. The run must end as the one that was never killed; `test_background_saving.py` compares.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lives import run_life
from tiny_run import write_recipe
from torch import Tensor

from sft_dist import train, worker
from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.host_copy import HostCopy
from sft_dist.checkpoint.manager import CheckpointManager

# (point, rank, in the background): the last two are passed by rank 0's main path, the others by the thread
DEATHS = (
    ("before write", 0, True), ("before write", 1, True), ("after write", 0, True), ("after write", 1, True),
    ("after manifest", 0, True), ("before rename", 0, False), ("after rename", 0, False),
)  # fmt: skip
SAVE = 3  # the one that is hit
CHANGES: dict[str, Any] = {
    "parallel": {"strategy": "fsdp2"},
    "tuning": {"method": "lora", "rank": 3, "dropout": 0.2},
    "checkpoint": {"every_steps": 2, "async": True},
    "eval": {"generate": 0, "every_steps": 4},
}


def die(point: str, rank: int, in_background: bool, words: list[str]) -> int:
    count = itertools.count(1)

    def fail_point(name: str) -> None:
        if name == point and next(count) == SAVE and os.environ["RANK"] == str(rank):
            assert in_background == (threading.current_thread().name == "sft-saver")
            os.kill(os.getpid(), signal.SIGKILL)

    train.CheckpointManager = partial(CheckpointManager, fail_point=fail_point)  # type: ignore[misc, assignment]
    return worker.main(words)


def copy_late(words: list[str]) -> int:
    """Nothing is copied before the loop stands right before the next update of the weights."""
    asked, wait, take = threading.Event(), BackgroundSaver.wait_for_copy, HostCopy.take

    def ask(saver: BackgroundSaver) -> None:
        if saver._write is not None and not saver._write.is_copied.is_set():
            asked.set()
        wait(saver)

    def take_late(copy: HostCopy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert asked.wait(60)
        asked.clear()
        return take(copy, tensors)

    BackgroundSaver.wait_for_copy, HostCopy.take = ask, take_late  # type: ignore[method-assign]
    return worker.main(words)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    waited = CHANGES | {"checkpoint": {"every_steps": 2, "async": False}}
    for name, changes, main in (("straight", CHANGES, copy_late), ("waited", waited, worker.main)):
        run_life(name, 2, partial(main, [str(write_recipe(place, name, **changes))]), place)
    for point, rank, in_background in DEATHS:
        name = f"{point}-{rank}".replace(" ", "-")
        words = [str(write_recipe(place, name, **CHANGES))]
        run_life(f"{name}-killed", 2, partial(die, point, rank, in_background, words), place, code=None)
        print(name, *sorted(path.name[:5] for path in (place / name / "checkpoints").iterdir()), flush=True)
        run_life(f"{name}-again", 2, partial(worker.main, words), place)
