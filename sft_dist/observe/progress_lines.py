"""How far a long preparation is, for a log that cannot show a bar: a line now and then.

preparing: 1.24 of 5.30 GB (23 %), 41.0 MB/s, about 0:01:39 left
reading the stream: 12,288 records, 1,140 records/s
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

_SECONDS_BETWEEN = 10.0


class ProgressLines:
    """Called with (bytes done, bytes in all) as often as anyone likes; `say` gets one line in ten seconds at most.

    Nothing is said of what is done within the first ten seconds, nor while the total is not known (0).
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._started = self._told = clock()
        self._records = 0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if total and now - self._told >= _SECONDS_BETWEEN:
            self._told = now
            self._say(progress_line(done, total, now - self._started))

    def stream(self, records: int) -> None:
        """`records` read so far of sources whose size nobody knows; 0 where another process tells. The rate is that
        since the line before, for training comes between."""
        now = self._clock()
        if records and now - self._told >= _SECONDS_BETWEEN:
            rate = max(records - self._records, 0) / (now - self._told)
            self._told, self._records = now, records
            self._say(f"reading the stream: {records:,} records, {rate:,.0f} records/s")


def progress_line(done: int, total: int, seconds: float) -> str:
    """Bytes, share, rate and the time left at that rate, after `seconds` of work."""
    rate = done / seconds
    left = f", about {timedelta(seconds=round((total - done) / rate))} left" if done else ""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return (
        f"preparing: {done / unit:,.2f} of {total / unit:,.2f} {name} ({100 * done / total:.0f} %), "
        f"{rate / 1e6:,.1f} MB/s{left}"
    )
