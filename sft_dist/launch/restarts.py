"""Whether to start a run again: what may pass by itself is tried again, as long as it gets somewhere.

    hang (71), storage (74), death by a signal     may pass: the machine's or the neighbour's fault
    everything else                                would only fail again: a mistake, bad data, NaN, a stop on request

Progress is the newest committed checkpoint: a run that dies before it has saved anything new does the same work again.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import folder_step
from sft_dist.errors import EXIT_HANG, EXIT_NO_PROGRESS, EXIT_STORAGE

FRUITLESS_LIMIT = 3  # restarts in a row without a new checkpoint
WISHES = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1})  # someone asked a worker to stop


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended: the code to exit with, and what is to be said of its cause."""

    code: int
    cause: str
    killed_by: int | None = None  # the signal of the worker that died first

    @property
    def may_pass(self) -> bool:
        """Whether the same command may well succeed the next time."""
        if self.code == 1:  # no worker left a code
            return self.killed_by is not None and self.killed_by not in WISHES
        return self.code in (EXIT_HANG, EXIT_STORAGE)


class Restarts:
    """The restarts of one launch: at most `allowed`, and FRUITLESS_LIMIT in a row without a step beyond the last."""

    def __init__(self, allowed: int, newest_step: int) -> None:
        self.allowed, self.used, self._fruitless, self._newest = allowed, 0, 0, newest_step

    def refuse(self, ending: Ending, newest_step: int) -> int | None:
        """After an attempt that `may_pass`: the code to give up with, None when a restart was granted (and counted)."""
        if newest_step > self._newest:
            self._fruitless, self._newest = 0, newest_step
        if self._fruitless >= FRUITLESS_LIMIT:
            return EXIT_NO_PROGRESS
        if self.used >= self.allowed:
            return ending.code
        self.used, self._fruitless = self.used + 1, self._fruitless + 1
        return None


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one."""
    return max((folder_step(path) or 0 for path in folders(run_dir)), default=0)
