"""What workers are given to do in tests. It imports nothing that a worker should not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_dist.errors import BadRecord


def doubled(number: int) -> int:
    """Twice the number; odd ones are refused."""
    if number % 2:
        raise BadRecord(f"{number} is odd")
    return 2 * number


def surroundings(task: object) -> dict[str, Any]:
    """The worker's descriptors, and how many threads the process has that it is a fork of."""
    targets = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    threads = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
    return {"sockets": sum("socket:" in one for one in targets), "threads": threads, "pid": os.getpid()}


def killed(task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stuck(task: object) -> None:
    """Tell who and whose fork this is, and never end."""
    os.write(2, f"{os.getpid()} {os.getppid()}\n".encode())
    signal.pause()


class Loaded:
    """Does a task, then tells the packages that were imported for it."""

    def __init__(self, action: Callable[[Any], Any]) -> None:
        self._action = action

    def __call__(self, task: Any) -> set[str]:
        self._action(task)
        return {name.partition(".")[0] for name in sys.modules}
