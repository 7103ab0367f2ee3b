"""When the clock asks for a save: what an interruption may cost, and what saving may, are both matters of time."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_SECONDS = 600.0  # between two saves
LONGEST_SECONDS = 1800.0  # of work that an interruption may cost
SAVES_APART = 50  # so many times the slowest save between two of them: they take at most 2 % of the time
STEPS_TO_COMMIT = 2  # the one in which the writing ends, and the next one, whose ranks agree on it


class Unsaved:
    """How long nothing has been saved. A save comes behind a step, so it has to be decided before that step.

    One that never `asks` for a save leaves them to the steps, or to another rank.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, *, asks: bool = True) -> None:
        self._now, self._asks = now, asks
        self._saved = self._asked = now()

    def is_due(self, save_seconds: float) -> bool:
        """Asked before each step: whether to save behind it, because enough time has passed by then for a save of
        `save_seconds` to be worth it, or because a save behind the next step would be too late.

        A save is there once it is written and, in the background, a later step has agreed on it: until then an
        interruption goes back to the one before. The coming steps are taken to last as long as the one before; where
        they grow, or a few of them are longer than LONGEST_SECONDS, that is exceeded. Saves that take longer than half
        of it are not begun the more often for it.
        """
        now = self._now()
        step_seconds, self._asked = now - self._asked, now
        behind_it = now + step_seconds - self._saved
        until_there = STEPS_TO_COMMIT * step_seconds + min(save_seconds, LONGEST_SECONDS / 2)
        is_worth_it = behind_it >= max(SHORTEST_SECONDS, SAVES_APART * save_seconds)
        return self._asks and (is_worth_it or behind_it + step_seconds + until_there > LONGEST_SECONDS)

    def begin_anew(self) -> None:
        """A save has begun."""
        self._saved = self._now()
