"""When the clock asks for a save, whatever the steps say: how much work an interruption costs is a matter of time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Unsaved:
    """How long nothing has been saved. A save comes behind a step, so it has to be decided before that step."""

    def __init__(self, limit_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_seconds, self._now = limit_seconds, now
        self._saved = self._asked = now()

    def is_due(self) -> bool:
        """Asked before each step: whether to save behind it, because behind the next one it would be too late. The
        next two are taken to last as long as the one before, so where steps grow or two of them are longer than the
        limit it is exceeded, by two steps at most."""
        now = self._now()
        step_seconds, self._asked = now - self._asked, now
        return now + 2 * step_seconds - self._saved > self._limit_seconds

    def begin_anew(self) -> None:
        """A save has begun."""
        self._saved = self._now()
