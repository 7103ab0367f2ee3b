"""What the nodes of a stuck run tell each other, so that the odd rank is named whichever node it is on.

    the node that finds the hang    what its ranks say -> RUN_DIR/logs/attempt_N/hang/node_00001.json
    the others                      see that file, or find the hang themselves, and do the same
    each node                       ends its ranks once all have told, or PATIENCE_SECONDS later
    the first that has told         accuses, of the ranks of all nodes

Without that the node that is first would end its ranks, and those of the others would die of a broken connection and
tell nothing. The run may hang because of its disk, so what touches it is done by threads that nobody waits for longer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sft_dist.launch.job import Job
from sft_dist.resilience.heartbeat import Beat
from sft_dist.resilience.stacks import Frame
from sft_dist.resilience.watchdog import Witness

PATIENCE_SECONDS = 10.0  # for the other nodes to look, and for their ranks to give stacks
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Testimony:
    """What one node, or all that have told, know of the hang."""

    silence_seconds: float
    witnesses: tuple[Witness, ...]
    speaker: int  # the node that tells the user


class Hearing:
    """Context manager of one node, entered once its workers run. With a single node there is nobody to ask."""

    def __init__(self, job: Job) -> None:
        self._folder, self._node, self._count = job.attempt_dir / "hang", job.nodes.index, job.nodes.count
        self._called, self._over = threading.Event(), threading.Event()
        self._told: dict[int, Testimony] = {}

    def __enter__(self) -> Self:
        if self._count > 1:
            threading.Thread(target=self._look_out, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @property
    def is_called(self) -> bool:
        """Whether another node has found the run stuck."""
        return self._called.is_set()

    def hear(self, silence_seconds: float, witnesses: Sequence[Witness]) -> Testimony:
        """Tell the other nodes what this one's ranks have said; what all have told within PATIENCE_SECONDS."""
        mine = Testimony(silence_seconds, tuple(witnesses), self._node)
        self._told = {self._node: mine}
        if self._count > 1:
            asking = threading.Thread(target=self._exchange, args=(mine,), daemon=True)
            asking.start()
            asking.join(PATIENCE_SECONDS)
            self._over.set()
        told = dict(self._told)
        together = [witness for node in sorted(told) for witness in told[node].witnesses]
        return Testimony(max(t.silence_seconds for t in told.values()), tuple(together), min(told))

    def _look_out(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with suppress(OSError):
                if next(self._folder.glob("node_*.json"), None) is not None:
                    self._called.set()
                    return

    def _exchange(self, mine: Testimony) -> None:
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            path = self._path(self._node)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(mine)))
            partial.replace(path)
        while len(self._told) < self._count and not self._over.is_set():
            for node in set(range(self._count)) - self._told.keys():
                with suppress(OSError):
                    self._told[node] = _read(self._path(node))
            time.sleep(_LOOK_SECONDS / 10)

    def _path(self, node: int) -> Path:
        return self._folder / f"node_{node:05d}.json"


def _read(path: Path) -> Testimony:
    told: dict[str, Any] = json.loads(path.read_text())
    witnesses = (
        Witness(w["rank"], Beat(**w["beat"]), tuple(Frame(**f) for f in w["frames"])) for w in told["witnesses"]
    )
    return Testimony(told["silence_seconds"], tuple(witnesses), told["speaker"])
