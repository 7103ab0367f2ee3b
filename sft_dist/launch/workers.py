"""The worker processes of one job on this machine: started, signalled, waited for, never left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sft_dist.launch.job import Job
from sft_dist.launch.relay import Relay
from sft_dist.resilience.flight_recorder import FlightRecorder
from sft_dist.resilience.heartbeat import HEARTBEATS_VARIABLE, Beat, Heartbeats
from sft_dist.resilience.orphan import set_parent_death_signal
from sft_dist.resilience.stacks import STACKS_SIGNAL, STACKS_VARIABLE, StackMemory

_POLL_SECONDS = 0.05


class Workers:
    """Context manager: enters with every rank of `job` started, leaves with every rank gone.

    `inherited` descriptors stay open in the workers (the run folder's lock).
    """

    def __init__(self, job: Job, inherited: tuple[int, ...] = ()) -> None:
        self._job, self._inherited = job, inherited
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: dict[int, int] = {}  # pidfd -> rank
        self._killed: set[int] = set()  # ranks that ended, or were ended, by our SIGKILL

    def __enter__(self) -> Workers:
        self._relay = Relay(self._job.log_path(self._job.rank(0)))
        self._heartbeats = Heartbeats(self._job.num_processes)
        self._recorder = FlightRecorder(self._job.attempt_dir)
        self._stacks = [StackMemory() for _ in range(self._job.num_processes)]
        try:
            for rank in range(self._job.num_processes):
                self._processes.append(self._start(rank))
                self._running[os.pidfd_open(self._processes[rank].pid)] = rank
            self._relay.start()  # threads only after the last fork
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._processes:
            process.wait()
        for descriptor in self._running:
            os.close(descriptor)
        self._running.clear()
        self._relay.finish()
        self._recorder.close()
        self._heartbeats.close()
        for memory in self._stacks:
            memory.close()

    @property
    def are_running(self) -> bool:
        """Whether any worker still runs."""
        return bool(self._running)

    @property
    def returncodes(self) -> list[int | None]:
        """By rank, as subprocess gives them: negative for a signal, None while running."""
        return [process.returncode for process in self._processes]

    def beats(self) -> dict[int, Beat]:
        """The newest sign of life of each worker that still runs."""
        return {rank: self._heartbeats.read(rank) for rank in sorted(self._running.values())}

    def stacks(self, seconds: float) -> dict[int, str]:
        """Ask each running worker for its Python stacks; what they gave within `seconds`, by rank."""
        asked = sorted(self._running.values())
        self.send(STACKS_SIGNAL)
        deadline = time.monotonic() + seconds
        given = dict.fromkeys(asked, "")
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            before, given = given, {rank: self._stacks[rank].read() for rank in asked}
            if all(given.values()) and given == before:
                break
        return given

    def records(self, seconds: float) -> list[Path]:
        """NCCL's records of its last collectives, of each running worker that gave one within `seconds`."""
        return self._recorder.dump([self._job.rank(index) for index in sorted(self._running.values())], seconds)

    def killed_by_others(self) -> int | None:
        """The first rank that died of a signal we did not send: neither `end`'s SIGTERM nor our SIGKILL."""
        ended = ((rank, code) for rank, code in enumerate(self.returncodes) if code is not None)
        ours = dict.fromkeys(self._killed, -signal.SIGKILL)
        return next((r for r, code in ended if code < 0 and code not in (-signal.SIGTERM, ours.get(r))), None)

    def wait(self, seconds: float | None = None) -> int | None:
        """Until all have ended, one has failed, or time is up; returns the rank that failed, else None."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self._running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = self._poll(left)
            failed = next((rank for rank in ended if self._processes[rank].returncode), None)
            if failed is not None or not ended:
                return failed
        return None

    def send(self, number: signal.Signals) -> None:
        """The signal to every worker that still runs."""
        for process in self._processes:
            process.send_signal(number)

    def end(self, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL for those that are still there after `grace_seconds`."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._running and (left := deadline - time.monotonic()) > 0:
            self.wait(left)
        self.kill()
        while self._running:
            self.wait()

    def kill(self) -> None:
        """SIGKILL to each running worker and the processes of its group."""
        for rank, process in enumerate(self._processes):
            if process.poll() is None:
                self._killed.add(rank)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _poll(self, seconds: float | None) -> list[int]:
        """Ranks that have ended since, lowest first; empty when time is up."""
        waiter = select.poll()
        for descriptor in self._running:
            waiter.register(descriptor, select.POLLIN)
        ready = waiter.poll(None if seconds is None else int(seconds * 1000) + 1)
        ended = []
        for descriptor, _ in ready:
            os.close(descriptor)
            ended.append(self._running.pop(descriptor))
            self._processes[ended[-1]].wait()
        return sorted(ended)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        """The first gets our terminal (by way of the relay), the others write to their log files."""
        if rank == 0:
            return self._spawn(rank, *self._relay.outputs)
        with self._job.log_path(self._job.rank(rank)).open("wb") as log:
            return self._spawn(rank, log.fileno(), log.fileno())

    def _spawn(self, rank: int, out: int, err: int) -> subprocess.Popen[bytes]:
        beats, stacks = self._heartbeats.fd, self._stacks[rank].fd
        shared = {HEARTBEATS_VARIABLE: str(beats), STACKS_VARIABLE: str(stacks)}
        return subprocess.Popen(
            self._job.command,
            env=self._recorder.environment | self._job.environment(rank, os.environ) | shared,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=(*self._inherited, beats, stacks),
            process_group=0,  # Ctrl-C must reach a worker once, through us
            preexec_fn=_tied_to(os.getpid()),
        )


def _tied_to(launcher: int) -> Callable[[], None]:
    """What a worker does before exec: die with `launcher`, also when that is gone already."""

    def tie() -> None:
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGKILL)

    return tie
