"""How far a long work is, in lines: one now and then for a log, or ever new ones in the same place of a terminal.

preparing: 1.24 of 5.30 GB (23 %), 41.0 MB/s, about 0:01:39 left
preparing: all is read; choosing the rows of each split, 0:02:20 so far
looking: 12,000 of 200,000 rows (6 %), 1,140 rows/s, about 0:02:45 left
reading the stream: 12,288 records, 1,140 records/s
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

_SECONDS_BETWEEN = 10.0


class ProgressLines:
    """Called with (done, in all) as often as anyone likes; `say` gets one line in `seconds_between` at most.

    Nothing is said of what is done within the first of them, nor while the total is not known (0). `unit` is `bytes`,
    or the name of what is counted.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        title: str = "preparing",
        unit: str = "bytes",
        seconds_between: float = _SECONDS_BETWEEN,
    ) -> None:
        self._say, self._clock, self._between = say, clock, seconds_between
        self._title, self._unit = title, unit
        self._started = self._told = clock()
        self._records = 0
        self._has_read = False

    def __call__(self, done: int, total: int) -> None:
        self._has_read = True
        now = self._clock()
        if total and now - self._told >= self._between:
            self._told = now
            self._say(f"{self._title}: {progress_line(done, total, now - self._started, self._unit)}")

    def stay(self) -> None:
        """The work goes on behind what was to be read. Nothing is said where nothing was: another process works."""
        now = self._clock()
        if self._has_read and now - self._told >= self._between:
            self._told = now
            seconds = timedelta(seconds=round(now - self._started))
            self._say(f"{self._title}: all is read; choosing the rows of each split, {seconds} so far")

    def stream(self, records: int) -> None:
        """`records` read so far of sources whose size nobody knows; 0 where another process tells. The rate is that
        since the line before, for training comes between."""
        now = self._clock()
        if records and now - self._told >= self._between:
            rate = max(records - self._records, 0) / (now - self._told)
            self._told, self._records = now, records
            self._say(f"reading the stream: {records:,} records, {rate:,.0f} records/s")


def progress_line(done: int, total: int, seconds: float, unit: str = "bytes") -> str:
    """Amount, share, rate and the time left at that rate, after `seconds` of work."""
    rate = done / seconds
    left = f", about {timedelta(seconds=round((total - done) / rate))} left" if done else ""
    share = f"({100 * done / total:.0f} %)"
    if unit != "bytes":
        return f"{done:,} of {total:,} {unit} {share}, {rate:,.0f} {unit}/s{left}"
    scale, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / scale:,.2f} of {total / scale:,.2f} {name} {share}, {rate / 1e6:,.1f} MB/s{left}"
