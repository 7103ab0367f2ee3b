"""Where is each rank of a run? For an operator who looks at a run that seems stuck; nothing is changed by looking.

    python -m sft_dist.launch.where RUN_DIR     the ranks on this machine, one JSON line each

Works from outside, whatever launcher started the workers: /proc tells which processes belong to the run, each of them
holds its heartbeat in memory that /proc shows (`/memfd:sft-heartbeats`), and SIGUSR2 makes those that hold
`/memfd:sft-stacks` write their Python stacks there, even while the interpreter is stuck.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_dist.resilience import heartbeat, stacks
from sft_dist.resilience.heartbeat import Beat, decode
from sft_dist.resilience.run_folder import EXIT_CODE_VARIABLE, RESULT_VARIABLE
from sft_dist.resilience.stacks import STACKS_SIGNAL, main_thread

STACKS_SECONDS = 2.0
_POLL_SECONDS = 0.05
_NODE = "SLURMD_NODENAME"


@dataclass(frozen=True, slots=True)
class Place:
    """One rank: its last sign of life, how long ago, and the innermost calls of its main thread."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    silent_seconds: float
    calls: tuple[str, ...]  # innermost first; none: it did not answer

    def __str__(self) -> str:
        at = self.calls[0] if self.calls else "gives no stack: it is stopped, or stuck in the kernel"
        return f"step {self.step}, {self.phase} for {self.silent_seconds:.1f} s, at {at}"


@dataclass(frozen=True, slots=True)
class _Worker:
    pid: int
    rank: int
    slot: int
    memories: Mapping[str, Path]  # name of a memfd -> its place in /proc


def find_ranks(run_dir: Path) -> list[Place]:
    """The ranks of the run on this machine, by number; empty when none runs here."""
    workers = sorted(_workers(run_dir.absolute()), key=lambda worker: worker.rank)
    answers = _ask_for_stacks(workers)
    found = []
    for worker in workers:
        beat = _beat(worker)
        calls = tuple(str(frame) for frame in main_thread(answers.get(worker.pid, ""))[:8])
        silent = max(0.0, time.monotonic() - beat.seconds) if beat.seconds else 0.0
        found.append(Place(worker.rank, _here(), worker.pid, beat.step, beat.phase, silent, calls))
    return found


def _workers(run_dir: Path) -> Iterator[_Worker]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environ = _environ(process)
            if _is_worker(words) and _belongs(environ, run_dir):
                rank, slot = _rank(environ)
                yield _Worker(int(process.name), rank, slot, dict(_memories(process)))


def _is_worker(words: list[str]) -> bool:
    """`python -m sft_dist.train`, or `sft-dist train` as a task of srun; launchers hold no memory of their own."""
    return "sft_dist.train" in words or any(Path(word).name in ("sft-dist", "sft_dist") for word in words[:4])


def _environ(process: Path) -> dict[str, str]:
    entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def _belongs(environ: Mapping[str, str], run_dir: Path) -> bool:
    """Whether its exit code is to go into this run folder, and its node is this one: containers of a machine, and the
    virtual nodes of our tests, may see each other's processes."""
    if environ.get(_NODE, _here()) != _here():
        return False
    named = (environ.get(name, "") for name in (EXIT_CODE_VARIABLE, RESULT_VARIABLE))
    return "RANK" in environ and any(name.startswith(f"{run_dir}/") for name in named)


def _here() -> str:
    """This node's name, the scheduler's where there is one."""
    return os.environ.get(_NODE) or socket.gethostname()


def _rank(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, place in the launcher's shared memory): a worker that was given none has one of its own."""
    slot = int(environ["LOCAL_RANK"]) if heartbeat.HEARTBEATS_VARIABLE in environ else 0
    return int(environ["RANK"]), slot


def _memories(process: Path) -> Iterator[tuple[str, Path]]:
    for descriptor in (process / "fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("/memfd:"):
            yield target.removeprefix("/memfd:").removesuffix(" (deleted)"), descriptor


def _beat(worker: _Worker) -> Beat:
    try:
        with worker.memories[heartbeat.MEMORY_NAME].open("rb") as file:
            return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), worker.slot)
    except (KeyError, OSError, ValueError):  # it is still loading its libraries, or has just ended
        return Beat(0, "start", 0.0, 0)


def _ask_for_stacks(workers: list[_Worker]) -> dict[int, str]:
    """What each worker that can answer has written since; a worker without the memory would die of the signal."""
    asked: dict[int, tuple[Path, int]] = {}
    for worker in workers:
        memory = worker.memories.get(stacks.MEMORY_NAME)
        if memory is not None and _catches(worker.pid):
            with suppress(OSError):
                asked[worker.pid] = memory, len(memory.read_bytes())
                os.kill(worker.pid, STACKS_SIGNAL)
    given: dict[int, str] = {}
    deadline = time.monotonic() + STACKS_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        before, given = given, {pid: _since(*place) for pid, place in asked.items()}
        if all(given.values()) and given == before:
            break
    return given


def _catches(pid: int) -> bool:
    """Whether the process has a handler for the signal, as the kernel knows it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (STACKS_SIGNAL - 1) & 1)


def _since(memory: Path, start: int) -> str:
    try:
        return memory.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""


def main() -> int:
    """Print the ranks of sys.argv[1] that run here."""
    for place in find_ranks(Path(sys.argv[1])):
        print(json.dumps(asdict(place)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
