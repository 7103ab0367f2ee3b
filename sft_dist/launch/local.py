"""Run a job on this machine: take the run folder, start the workers, watch them, translate how they ended.

    resolve recipe -> claim RUN_DIR (lock, attempt folder) -> config.yaml -> one process per rank
      -> wait: a dying worker ends the others; SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on
      -> exit code from logs/attempt_N/exit_code

Workers die with this process (parent-death signal) and hold the run folder's lock open, so the folder is free exactly
when the last of them is gone. No torch here.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sft_dist import errors
from sft_dist.config.loader import dump_recipe, load_recipe
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, StorageError
from sft_dist.launch.job import RESOLVED_NAME, Job, choose_num_processes, worker_command
from sft_dist.launch.workers import Workers
from sft_dist.resilience.run_folder import Claim, append_event, claim, read_exit_code

EXIT_CODES = (
    errors.EXIT_USAGE,
    errors.EXIT_DATA,
    errors.EXIT_NONFINITE,
    errors.EXIT_HANG,
    errors.EXIT_LOCKED,
    errors.EXIT_STORAGE,
    errors.EXIT_STOPPED,
)
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL for the peers of a dead worker: they cannot finish a step without it
TAIL_LINES = 20
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone: to a worker that means stop
}


def run(recipe_files: Sequence[str | Path], overrides: Sequence[str], nproc: int | None, dry_run: bool = False) -> int:
    """Train the recipe on this machine with `nproc` workers (None: all visible GPUs, else 1); returns the exit code.

    With `dry_run` prints the resolved recipe and the worker command, and starts nothing.
    """
    recipe = load_recipe(recipe_files, overrides)
    num_processes = choose_num_processes(nproc)
    run_dir = Path(recipe.run.dir)
    command = worker_command(run_dir)
    if dry_run:
        print(dump_recipe(recipe), end="")
        print(f"# {num_processes} x {shlex.join(command)}")
        return EXIT_DONE
    taken = claim(run_dir, sys.argv)
    try:
        write_resolved(taken, recipe)
        return supervise(Job(command, num_processes, run_dir, taken.attempt), inherited=(taken.lock.fd,))
    finally:
        taken.lock.release()


def write_resolved(taken: Claim, recipe: Recipe) -> None:
    """RUN_DIR/config.yaml, which workers read, and a copy in the attempt's folder, which stays."""
    kept, shown = taken.attempt_dir / RESOLVED_NAME, taken.run_dir / RESOLVED_NAME
    try:
        kept.write_text(dump_recipe(recipe))
        partial = shown.with_name(f".{RESOLVED_NAME}.partial")
        shutil.copyfile(kept, partial)
        partial.replace(shown)
    except OSError as error:
        raise StorageError(f"{shown}: cannot be written ({error.strerror}): make room or move run.dir") from error


def supervise(job: Job, *, inherited: tuple[int, ...] = (), grace_seconds: float = GRACE_SECONDS) -> int:
    """Start the job's workers and stay until all have ended; returns the code to exit with. Main thread only."""
    append_event(job.attempt_dir, "start", processes=job.num_processes, command=list(job.command))
    with Workers(job, inherited) as workers, _forwarding(workers):
        failed = workers.wait()
        if failed is not None:
            workers.end(grace_seconds)
    returncodes = workers.returncodes
    code = exit_code(job, returncodes, failed)
    append_event(job.attempt_dir, "end", code=code, returncodes=returncodes)
    if failed is not None and (failed > 0 or returncodes[failed] != code):
        print(obituary(job, failed, returncodes[failed] or 0), file=sys.stderr, flush=True)
    return code


def exit_code(job: Job, returncodes: Sequence[int | None], failed: int | None = None) -> int:
    """The worker's word in `exit_code`, unless it says done and yet a worker failed; else the code of the worker that
    `failed` first, if it is one of ours; else 1."""
    left = read_exit_code(job.attempt_dir)
    if left is not None and (left != EXIT_DONE or not any(returncodes)):
        return left
    code = None if failed is None else returncodes[failed]
    return code if code in EXIT_CODES else 1


def obituary(job: Job, rank: int, returncode: int) -> str:
    """Which worker died first, of what, and, where the terminal has not shown it, the end of its log."""
    cause = f"of {signal.Signals(-returncode).name}" if returncode < 0 else f"with code {returncode}"
    log = job.log_path(rank)
    head = f"sft-dist: error: rank {rank} of {job.num_processes} died {cause} and the others were ended; see {log}"
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if rank > 0 else []
    return "\n".join([head, *(f"  | {line}" for line in lines)])


@contextmanager
def _forwarding(workers: Workers) -> Iterator[None]:
    """Pass on the signals that ask for a stop; this process itself goes on waiting for its workers."""
    previous = {
        number: signal.signal(number, lambda got, _: workers.send(FORWARDED[signal.Signals(got)]))
        for number in FORWARDED
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
