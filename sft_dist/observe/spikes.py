"""A loss far above the recent ones is told with its examples; it changes nothing.

Robust: the middle of the last steps and the median absolute deviation around it (Hampel, 1974), so that neither the
fall of the loss at the start nor an earlier spike widens the bounds by much.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW_STEPS, LEAST_STEPS = 200, 20
DEVIATIONS = 8.0  # of the normal distribution: the median absolute deviation is 0.6745 of one
LEAST_RATIO = 0.01  # of the median: where all losses are nearly equal, rounding is no spike


class Spikes:
    """The recent losses, and whether the next one stands out."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._recent = deque(losses, maxlen=WINDOW_STEPS)

    def limit(self) -> float | None:
        """What a loss has to exceed; None while there are too few."""
        if len(self._recent) < LEAST_STEPS:
            return None
        middle = median(self._recent)
        deviation = median(abs(loss - middle) for loss in self._recent) / 0.6745
        return middle + max(DEVIATIONS * deviation, LEAST_RATIO * abs(middle))

    def see(self, loss: float) -> float | None:
        """Take `loss` into account; the limit it exceeded, None for a usual one (and for no number)."""
        if not math.isfinite(loss):
            return None
        limit = self.limit()
        self._recent.append(loss)
        return limit if limit is not None and loss > limit else None
