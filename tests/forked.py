"""Real runs that start in a tenth of a second: torch is imported once, launcher and ranks are forks of this process.

    run = Forked(recipe, num_ranks=2, log=folder / "out.txt", before=arm)
    run.start()                    # `sft-dist train RECIPE --nproc 2`, in a child
    code = run.wait(seconds=60)

The launcher is the product's own (lock, attempts, restarts, watchdog, signals), and so is everything a rank does; only
`exec` is left out: where the launcher would start `python -m sft_dist.train`, the rank is forked with the environment,
descriptors, process group and parent-death signal that it would have had, and calls the same `main`. `before(rank,
attempt)` runs in each rank before that: there a test arms its fault.

Fork before anything computes: a process that has started torch's thread pool cannot be forked safely.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_WAIT_POLICY"] = (
    "PASSIVE"  # threads that spin for each other take a hundred times as long when it is busy
)

import matplotlib.backends.backend_agg  # what ranks import as they go: once, before the forks
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from sft_dist import worker
from sft_dist.cli.main import main as command_line
from sft_dist.launch import local, workers
from sft_dist.launch.workers import Workers
from sft_dist.redaction import hiding_secrets
from sft_dist.resilience.ending import exit_code_of
from sft_dist.resilience.heartbeat import HEARTBEATS_VARIABLE, heart
from sft_dist.resilience.orphan import set_parent_death_signal
from sft_dist.resilience.stacks import STACKS_VARIABLE, answer_with_stacks

gc.freeze()  # no collection in a rank need go through what the libraries hold

Before = Callable[[int, int], None]  # (rank, attempt)


def nothing(rank: int, attempt: int) -> None:
    """No fault."""


class Child:
    """A forked process with the part of subprocess.Popen's face that the launcher looks at."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The return code as subprocess gives it; raises TimeoutError after `timeout` seconds."""
        if timeout is None:
            while self._reap(0) is None:
                pass
        else:
            deadline = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
                time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Forked:
    """One launcher with its ranks. What all of them print goes to `log`."""

    def __init__(
        self, recipe: Path, num_ranks: int, log: Path, before: Before = nothing, settings: Sequence[str] = ()
    ) -> None:
        self.words = ["train", str(recipe), *settings, "--nproc", str(num_ranks)]
        self.log, self.before = log, before

    def start(self) -> Child:
        self.child = fork(lambda: command(self.words, self.before), self.log)
        return self.child

    def wait(self, seconds: float = 120.0) -> int:
        """The launcher's exit code; ends it, and with it its ranks, when it takes longer."""
        try:
            return self.child.wait(seconds)
        except TimeoutError:
            self.child.send_signal(signal.SIGKILL)
            self.child.wait()
            raise

    def run(self, seconds: float = 120.0) -> int:
        self.start()
        return self.wait(seconds)


def command(words: list[str], before: Before = nothing) -> int:
    """`sft-dist WORDS` in this process, the ranks that it starts as forks; its exit code."""
    os.setsid()

    class ForkedWorkers(Workers):
        def _spawn(self, rank: int, out: int, err: int) -> Any:
            beats, stacks = self._heartbeats.fd, self._stacks[rank].fd
            shared = {HEARTBEATS_VARIABLE: str(beats), STACKS_VARIABLE: str(stacks)}
            environment = self._job.environment(rank, os.environ) | shared
            kept = (*self._inherited, beats, stacks)
            launcher = os.getpid()
            return fork(lambda: rank_main(rank, self._job, environment, before, launcher), out, err, kept)

    local.Workers = ForkedWorkers  # type: ignore[misc]
    return command_line(words)


def rank_main(rank: int, job: Any, environment: dict[str, str], before: Before, launcher: int) -> int:
    """What `python -m sft_dist.train` does between exec and exit."""
    os.setpgid(0, 0)
    workers._tied_to(launcher)()
    os.environ.clear()
    os.environ.update(environment)
    heart.cache_clear()
    answer_with_stacks()
    before(rank, job.attempt)
    with hiding_secrets():
        return exit_code_of(lambda: worker.main(list(job.command[job.command.index("--resolved") :])))


def fork(body: Callable[[], int], out: int | Path, err: int | None = None, kept: tuple[int, ...] = ()) -> Child:
    """Run `body` in a child with default signals, its output in `out`, and no other descriptors than `kept`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 70
    try:
        set_parent_death_signal()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _redirect(out, err, kept)
        code = body()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(out: int | Path, err: int | None, kept: tuple[int, ...]) -> None:
    if isinstance(out, Path):
        out = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out if err is None else err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own descriptor
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
