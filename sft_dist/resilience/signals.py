"""Asked to stop: SIGTERM, SIGUSR1, SIGINT or a `stop` file set a flag; the loop reads it at a step boundary.

Nothing is saved inside a handler. One rank seeing the flag is enough: the loop OR-reduces it over all ranks. A second
SIGINT ends the process at once, because the first one gives the signal its default action back. (Where the interpreter
was stuck in native code at the first one already, our launcher's SIGKILL ends it: launch/stops.py.)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE_VARIABLE = "SFT_STOP_FILE"  # set by launch/worker.sh: a stop request that does not know the run folder


class StopFlag:
    """Truthy once a stop was asked for; `reason` says by what. Install it in the main thread."""

    def __init__(self, stop_files: Iterable[str | Path] = ()) -> None:
        extra = os.environ.get(STOP_FILE_VARIABLE)
        self.stop_files = [Path(name) for name in (*stop_files, *([extra] if extra else []))]
        self.reason: str | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def install(self) -> StopFlag:
        """Take over the stop signals, also those that a launcher's shell left ignored."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def restore(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the program."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        if self.reason is None:
            found = next((path for path in self.stop_files if path.exists()), None)
            if found is not None:
                self.reason = f"stop file {found}"
        return self.reason is not None

    def __enter__(self) -> StopFlag:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()
