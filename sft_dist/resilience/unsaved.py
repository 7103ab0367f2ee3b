"""When the clock asks for a save: what an interruption may cost, and what saving may, are both matters of time."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_SECONDS = 600.0  # between two saves
LONGEST_SECONDS = 1800.0  # of work that an interruption may cost
SAVES_APART = 50  # so many times the slowest save between two of them: they take at most 2 % of the time


class Unsaved:
    """How long nothing has been saved. A save comes behind a step, so it has to be decided before that step."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._saved = self._asked = now()

    def is_due(self, save_seconds: float) -> bool:
        """Asked before each step: whether to save behind it, because enough time has passed by then for a save of
        `save_seconds` to be worth it, or because behind the next step it would be too late. The next two are taken to
        last as long as the one before, so where steps grow or two of them are longer than LONGEST_SECONDS, that is
        exceeded, by two steps at most."""
        now = self._now()
        step_seconds, self._asked = now - self._asked, now
        behind_it = now + step_seconds - self._saved
        return (
            behind_it >= max(SHORTEST_SECONDS, SAVES_APART * save_seconds) or behind_it + step_seconds > LONGEST_SECONDS
        )

    def begin_anew(self) -> None:
        """A save has begun."""
        self._saved = self._now()
