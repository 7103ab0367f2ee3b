"""How far a command is: on a terminal a line that changes, elsewhere one in ten seconds; with rate and time left.

On stderr, so that stdout is the answer alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sft_dist.observe.progress_lines import ProgressLines

_SECONDS_BETWEEN = 0.2  # on a terminal


@contextmanager
def shown_progress(title: str, unit: str) -> Iterator[ProgressLines]:
    """Yields `progress(done, total)`; `unit` is `bytes`, or the name of what is counted."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(tell, title=title, unit=unit)
        return
    with console.status(title) as status:
        yield ProgressLines(status.update, title=title, unit=unit, seconds_between=_SECONDS_BETWEEN)


def tell(line: str) -> None:
    """A line beside the answer."""
    print(line, file=sys.stderr, flush=True)
