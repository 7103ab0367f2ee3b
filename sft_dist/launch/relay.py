"""Rank 0's output: to our own terminal as it comes, and into its log file as well.

Each of stdout and stderr becomes a pipe, or a pseudo-terminal where ours is a terminal (so that rank 0 still draws a
progress bar). One thread per channel copies the bytes to both places. A reader that went away (`| head`) ends the
copying to it, not the run.
"""

from __future__ import annotations

import os
import pty
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_DRAIN_SECONDS = 2.0  # a grandchild may hold a channel open after the worker has ended
_CHUNK_BYTES = 1 << 16


class Relay:
    """`outputs` are the descriptors for rank 0's stdout and stderr; call `start` once rank 0 has them."""

    def __init__(self, log_path: Path) -> None:
        self._log = log_path.open("wb", buffering=0)
        out, err = _descriptor(sys.stdout, 1), _descriptor(sys.stderr, 2)
        self._channels = [_Channel(out)] if _is_same_file(out, err) else [_Channel(out), _Channel(err)]
        self._threads: list[threading.Thread] = []

    @property
    def outputs(self) -> tuple[int, int]:
        """Where rank 0 writes: one channel for both when our stdout and stderr are the same file."""
        return self._channels[0].inner, self._channels[-1].inner

    def start(self) -> None:
        """Close our copies of rank 0's ends and begin to copy."""
        for channel in self._channels:
            os.close(channel.inner)
            self._threads.append(threading.Thread(target=channel.copy, args=(self._log,), daemon=True))
            self._threads[-1].start()

    def finish(self) -> None:
        """Wait until what an ended rank 0 has written is copied."""
        for thread in self._threads:
            thread.join(_DRAIN_SECONDS)


class _Channel:
    """Bytes from `inner` (rank 0's end) by way of `outer` to our own `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        if os.isatty(target):
            self.outer, self.inner = pty.openpty()
            _look_alike(self.inner, target)
        else:
            self.outer, self.inner = os.pipe()

    def copy(self, log: BinaryIO) -> None:
        """Until the worker's end is closed. Whole lines go to `log`, which the other channel writes to as well."""
        is_read, pending = True, b""
        while chunk := _read(self.outer):
            is_read = is_read and _write(self.target, chunk)
            lines, newline, pending = (pending + chunk).rpartition(b"\n")
            with suppress(OSError):  # a full disk costs lines of the log; not reading on would stop rank 0
                log.write(lines + newline)
        with suppress(OSError):
            log.write(pending)


def _read(descriptor: int) -> bytes:
    """The next bytes; empty at the end, which a pseudo-terminal tells by EIO."""
    try:
        return os.read(descriptor, _CHUNK_BYTES)
    except OSError:
        return b""


def _write(descriptor: int, chunk: bytes) -> bool:
    """Write all of `chunk`; False once nobody reads there any more."""
    try:
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]
    except OSError:
        return False
    return True


def _look_alike(inner: int, target: int) -> None:
    """The real terminal's size, and no newline translation of its own: the real one translates already."""
    with suppress(termios.error):
        termios.tcsetwinsize(inner, termios.tcgetwinsize(target))
        attributes = termios.tcgetattr(inner)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(inner, termios.TCSANOW, attributes)


def _descriptor(stream: object, fallback: int) -> int:
    """The descriptor under `stream`; tests and notebooks put objects without one in its place."""
    try:
        return stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return fallback


def _is_same_file(first: int, second: int) -> bool:
    one, other = os.fstat(first), os.fstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
