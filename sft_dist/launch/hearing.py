"""What the nodes of a stuck run tell each other, so that the odd rank is named whichever node it is on.

    the node that finds the hang    RUN_DIR/logs/attempt_N/hang/node_00001.called at once
    the others                      see that file, or find the hang themselves
    each node                       what its ranks say -> hang/node_00001.json
                                    ends its ranks once all have told, or PATIENCE_SECONDS and a look after it began
    the first that has told         accuses, of the ranks of all nodes

Without that the node that is first would end its ranks, and those of the others would die of a broken connection and
tell nothing. The run may hang because of its disk, so what touches it is done by threads that nobody waits for longer.
"""

from __future__ import annotations

import json
import os
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

PATIENCE_SECONDS = 10.0  # from the call on: for the other nodes to look, and for the ranks of all to give stacks
_LOOK_SECONDS = 0.5
_LOOKS_PER_SECOND = 64  # of all nodes together: the folder's server has a run to serve
_LISTED = 8


@dataclass(frozen=True, slots=True)
class Testimony:
    """What one node, or all that have told, know of the hang."""

    silence_seconds: float
    witnesses: tuple[Witness, ...]
    speaker: int  # the node that tells the user
    missing: tuple[int, ...] = ()  # the nodes that have not told


class Hearing:
    """Context manager of one node, entered once its workers run. With a single node there is nobody to ask."""

    def __init__(self, job: Job) -> None:
        self._folder, self._node, self._count = job.attempt_dir / "hang", job.nodes.index, job.nodes.count
        self._look_seconds = max(_LOOK_SECONDS, self._count / _LOOKS_PER_SECOND)
        self._called, self._over = threading.Event(), threading.Event()
        self._told: dict[int, Testimony] = {}
        self._began = 0.0  # when this node called, by the monotonic clock

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

    def call(self) -> None:
        """Have the other nodes ask their ranks while this one asks its own. Once, before `hear`."""
        self._began = time.monotonic()
        if self._count > 1:
            threading.Thread(target=self._leave_call, daemon=True).start()

    def hear(self, silence_seconds: float, witnesses: Sequence[Witness]) -> Testimony:
        """Tell the other nodes what this one's ranks have said; what all have told within our patience."""
        mine = Testimony(silence_seconds, tuple(witnesses), self._node)
        self._told = {self._node: mine}
        if self._count > 1:
            asking = threading.Thread(target=self._exchange, args=(mine,), daemon=True)
            asking.start()
            asking.join(self._began + PATIENCE_SECONDS + self._look_seconds - time.monotonic())
            self._over.set()
        told = dict(self._told)
        together = [witness for node in sorted(told) for witness in told[node].witnesses]
        missing = tuple(node for node in range(self._count) if node not in told)
        return Testimony(max(t.silence_seconds for t in told.values()), tuple(together), min(told), missing)

    def _look_out(self) -> None:
        with suppress(OSError):  # before it is looked for: see `_names`
            self._folder.mkdir(exist_ok=True)
        while not self._over.wait(self._look_seconds):
            if self._names():
                self._called.set()
                return

    def _leave_call(self) -> None:
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            self._path(self._node).with_suffix(".called").touch()

    def _exchange(self, mine: Testimony) -> None:
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            path = self._path(self._node)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(mine)))
            partial.replace(path)
        while True:
            for node, path in self._testimonies().items():
                if node not in self._told:
                    with suppress(OSError):
                        self._told[node] = _read(path)
            if len(self._told) >= self._count or self._over.wait(_LOOK_SECONDS):
                return

    def _testimonies(self) -> dict[int, Path]:
        """The files of the nodes that have told."""
        found = {_node_of(name): self._folder / name for name in self._names()}
        return {node: path for node, path in found.items() if node is not None}

    def _names(self) -> list[str]:
        """What lies in the folder. One listing: what is asked for by name before it is there, the folder too, stays
        absent for seconds on NFS, and each such question is a call to the server."""
        with suppress(OSError):
            return os.listdir(self._folder)
        return []

    def _path(self, node: int) -> Path:
        return self._folder / f"node_{node:05d}.json"


def no_word_from(missing: Sequence[int]) -> str:
    """The nodes that have not told, in a few words."""
    numbers = ", ".join(map(str, missing[:_LISTED]))
    more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    return f"no word from {'node' if len(missing) == 1 else 'nodes'} {numbers}{more}"


def _node_of(name: str) -> int | None:
    number = name.removeprefix("node_").removesuffix(".json")
    return int(number) if name == f"node_{number}.json" and number.isdigit() else None


def _read(path: Path) -> Testimony:
    told: dict[str, Any] = json.loads(path.read_text())
    witnesses = (
        Witness(w["rank"], Beat(**w["beat"]), tuple(Frame(**f) for f in w["frames"])) for w in told["witnesses"]
    )
    return Testimony(told["silence_seconds"], tuple(witnesses), told["speaker"])
