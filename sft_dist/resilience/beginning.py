"""What a worker does before anything slow: from here on it leaves no orphan and can be asked where it is."""

from __future__ import annotations

import signal

from sft_dist.resilience.orphan import die_with_ancestors
from sft_dist.resilience.stacks import answer_with_stacks


def begin_as_worker() -> None:
    """Call it before torch is imported: a launcher that is killed meanwhile must not leave this process behind."""
    die_with_ancestors()
    answer_with_stacks()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens: Ctrl-C ends it without a traceback
