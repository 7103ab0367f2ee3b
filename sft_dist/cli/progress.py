"""A bar with rate and time left on a terminal, nothing elsewhere; on stderr, so that stdout is the answer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`; `unit` is `bytes`, or the name of what is counted."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    of_bytes, of_things = (DownloadColumn(), TransferSpeedColumn()), (MofNCompleteColumn(), TextColumn(unit))
    counters = of_bytes if unit == "bytes" else of_things
    console = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), *counters, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
