"""A SIGKILL that the kernel delivers after a delay, wherever the process is then: in Python, in native code, asleep."""

from __future__ import annotations

import ctypes
import signal

_CLOCK_MONOTONIC = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Event(ctypes.Structure):  # struct sigevent, 64 bytes
    _fields_ = [
        ("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int), ("pad", ctypes.c_char * 48),
    ]  # fmt: skip


class _Times(ctypes.Structure):  # struct itimerspec: interval, then the time to the first expiry
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


def kill_me_in(seconds: float) -> None:
    """Arm the timer; it cannot be called back."""
    timer, event = ctypes.c_void_p(), _Event(None, signal.SIGKILL, 0, b"")
    nanoseconds = max(1, int(seconds * 1e9))
    times = _Times(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
    for failed in (
        _LIBC.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)),
        _LIBC.timer_settime(timer, 0, ctypes.byref(times), None),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "timer")
