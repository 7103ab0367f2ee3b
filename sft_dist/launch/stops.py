"""The signals that ask a launcher for a stop: they go to its workers, and it stays with them."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from sft_dist.launch.workers import Workers

TWICE_SECONDS = 0.5  # between two SIGINTs that one Ctrl-C has sent
INTERRUPTED = b"sft-dist: stopping with a checkpoint at the end of this step; Ctrl-C again ends it at once\n"
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone: to a worker that means stop
}


class Stops:
    """Context manager: the signals that ask for a stop go to the workers there are; this process stays with them.

    `asked` says that one has come. It outlives the attempt: a run that was asked to stop is not started again.
    The second SIGINT is SIGKILL to the workers: one that is stuck in native code looks at no signal that it handles.
    Within TWICE_SECONDS of the first it is the same one, from a forwarder and from the terminal, and goes to nobody.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.has_killed = False
        self._interrupted: float | None = None  # when the first SIGINT came
        self._workers: Workers | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def pass_to(self, workers: Workers) -> None:
        """`workers` get what comes from now on, and what came while there were none."""
        self._workers = workers
        if self.asked is not None:
            workers.send(FORWARDED[self.asked])

    def __enter__(self) -> Stops:
        for number in FORWARDED:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        if number != signal.SIGINT:
            self._pass_on()
        elif self._interrupted is None:
            self._interrupted = time.monotonic()
            os.write(2, INTERRUPTED)  # `print` may be at work below this handler
            self._pass_on()
        elif time.monotonic() - self._interrupted > TWICE_SECONDS and self._workers is not None:
            self.has_killed = self._workers.are_running
            self._workers.kill()

    def _pass_on(self) -> None:
        if self._workers is not None and self.asked is not None:
            self._workers.send(FORWARDED[self.asked])
