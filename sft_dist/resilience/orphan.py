"""No orphans: a worker dies with the process that started it, and with every launcher above that one.

Two mechanisms, because each misses something. The parent-death signal is the kernel's: it ends the worker even while
the interpreter is stuck, but only for the direct parent. DeepSpeed's runner starts a second launcher which starts the
workers, and worker.sh starts torchrun: for those a daemon thread waits on one pidfd per launcher among the ancestors
and SIGKILLs this process when any of them ends. Ancestors that are no launchers (a shell, ssh, pytest) may come and go.

Call `die_with_ancestors()` before importing torch: from then on the window is closed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec nothing should load libraries

_PROGRAMS = frozenset({"torchrun", "accelerate", "accelerate-launch", "deepspeed", "sft-dist", "sft_dist"})
_MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands",
    "deepspeed.launcher",
    "sft_dist",
)
_SHELLS = frozenset({"bash", "sh", "dash"})
_SCRIPTS = frozenset({"worker.sh"})
_OPTIONS_WITH_VALUE = frozenset({"-W", "-X", "--check-hash-based-pycs"})


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process tree."""

    pid: int
    argv: tuple[str, ...]


def die_with_ancestors() -> tuple[Process, ...]:
    """Tie this process's life to its parent's and to every launcher's above it; returns the launchers watched.

    Ends the process at once when its launcher is already gone. Linux only; elsewhere nothing is watched.
    """
    if not sys.platform.startswith("linux"):
        return ()
    parent = os.getppid()
    set_parent_death_signal()
    launchers = tuple(process for process in ancestors() if is_launcher(process.argv))
    descriptors = [_pidfd(process.pid) for process in launchers]
    if os.getppid() != parent or (parent == 1 and not launchers and is_managed(os.environ)):
        os.kill(os.getpid(), signal.SIGKILL)
    if descriptors:
        threading.Thread(target=_wait_and_die, args=(descriptors,), name="ancestor-watch", daemon=True).start()
    return launchers


def launcher_commands() -> list[tuple[str, ...]]:
    """Command lines of the launchers above this process, nearest first; empty when it was started by hand."""
    return [process.argv for process in ancestors() if is_launcher(process.argv)]


def set_parent_death_signal(number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when the thread that started it ends (prctl(2))."""
    _LIBC.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def ancestors(pid: int | None = None) -> list[Process]:
    """Parent, grandparent, ... up to process 1, as far as /proc shows them."""
    found: list[Process] = []
    current = _parent(os.getpid() if pid is None else pid)
    while current > 0:
        found.append(Process(current, _argv(current)))
        current = _parent(current)
    return found


def is_launcher(argv: Sequence[str]) -> bool:
    """Whether this command line is one that starts workers: torchrun, accelerate, deepspeed, sft-dist or worker.sh."""
    if not argv:
        return False
    program = PurePath(argv[0]).name
    if program in _PROGRAMS:
        return True
    if program in _SHELLS:
        script = next((word for word in argv[1:] if not word.startswith("-")), "")
        return "-c" not in argv[1:2] and PurePath(script).name in _SCRIPTS
    return program.startswith("python") and _runs_launcher(argv[1:])


def is_managed(environ: Mapping[str, str]) -> bool:
    """Whether some launcher's variables are in the environment, so that there must be a live launcher above."""
    return any(name in environ for name in ("TORCHELASTIC_RUN_ID", "SFT_RENDEZVOUS", "CROSS_RANK"))


def _runs_launcher(words: Sequence[str]) -> bool:
    """Python's own arguments: the module after -m, or the first word that is no option, decides."""
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("-") and not word.startswith("--") and word.endswith("m"):  # -m, -um
            module = words[0] if words else ""
            return any(module == name or module.startswith(name + ".") for name in _MODULES)
        if word in _OPTIONS_WITH_VALUE:
            words = words[1:]
        elif not word.startswith("-"):
            return PurePath(word).name in _PROGRAMS
    return False


def _wait_and_die(descriptors: Sequence[int]) -> None:
    waiter = select.poll()
    for descriptor in descriptors:
        waiter.register(descriptor, select.POLLIN)
    waiter.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _pidfd(pid: int) -> int:
    """A descriptor that becomes readable when `pid` ends; ends this process when it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        raise


def _parent(pid: int) -> int:
    """Parent of `pid`; 0 where the tree ends or the process has gone. The name in stat may hold spaces and brackets."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _argv(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(word.decode(errors="replace") for word in raw.split(b"\0")[:-1])
