"""Python stacks of a worker that no longer answers: asked for by a signal, written into memory its launcher holds.

The worker registers faulthandler for SIGUSR2. Its handler is C code: it writes all threads even while the interpreter
is stuck in a call that holds its lock. A process that is stopped, or stuck in the kernel, gives none. The memory is an
anonymous file (memfd), so that a run that hangs on its disk can still say where.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from dataclasses import dataclass
from pathlib import PurePath

STACKS_VARIABLE = "SFT_STACKS"  # number of the inherited descriptor
STACKS_SIGNAL = signal.SIGUSR2
MEMORY_NAME = "sft-stacks"  # as /proc shows it
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')


def answer_with_stacks() -> None:
    """Worker: write stacks when the launcher asks, and to stderr on a fatal signal (a crash in native code)."""
    faulthandler.enable()
    inherited = os.environ.get(STACKS_VARIABLE)
    file = StackMemory().fd if inherited is None else int(inherited)  # its own, where no launcher of ours asks
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


class StackMemory:
    """Launcher: where one worker, which inherits `fd`, leaves its stacks."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(MEMORY_NAME)

    def read(self) -> str:
        """What was written so far; empty while there was no answer."""
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Frame:
    """One call on a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{PurePath(self.file).name}:{self.line} in {self.function}"


def main_thread(text: str) -> tuple[Frame, ...]:
    """Frames of the main thread, innermost first: faulthandler lists the newest thread first, so it is the last."""
    block = text.rstrip().rpartition("\n\n")[2]
    found = (_FRAME.fullmatch(line) for line in block.splitlines())
    return tuple(Frame(match["file"], int(match["line"]), match["function"]) for match in found if match)
