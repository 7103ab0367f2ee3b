"""Run a job on this machine: take the run folder, start the workers, watch them, translate how they ended.

    resolve recipe -> claim RUN_DIR (lock, attempt folder) -> config.yaml -> one process per rank
      -> wait: a dying worker ends the others; SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on
         no sign of life from any rank for too long: every rank's stacks, the odd one out (launch/hearing.py asks the
         other nodes), SIGKILL, 71
      -> exit code from logs/attempt_N/exit_code
      -> after a hang, a storage failure or a death by signal: the next attempt, under the same lock

With several nodes each runs this for its own workers (launch/nodes.py); the first one claims the folder.

Workers die with this process (parent-death signal) and hold the run folder's lock open, so the folder is free exactly
when the last of them is gone. No torch here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sft_dist.config.auto import refuse_uneven
from sft_dist.config.loader import dump_recipe, load_recipe
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_HANG, EXIT_NO_PROGRESS, StorageError
from sft_dist.launch.hearing import Hearing, Testimony, no_word_from
from sft_dist.launch.job import RESOLVED_NAME, Job, choose_num_processes, worker_command
from sft_dist.launch.nodes import hosting, join, read_nodes
from sft_dist.launch.obituary import how_it_ended
from sft_dist.launch.restarts import Ending, Restarts, newest_step
from sft_dist.launch.stops import Stops
from sft_dist.launch.workers import Workers
from sft_dist.resilience.flight_recorder import DUMP_PREFIX
from sft_dist.resilience.run_folder import (
    STOP_NAME,
    Claim,
    append_event,
    claim,
    has_begun_anew,
    next_attempt,
    write_exit_code,
)
from sft_dist.resilience.stacks import main_thread
from sft_dist.resilience.watchdog import Watchdog, Witness, accuse

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL for the peers of a dead worker: they cannot finish a step without it
LOOK_SECONDS = 0.5  # between looks at the signs of life
RECORDS_SECONDS = 3.0  # NCCL looks once a second whether it is asked for its record; on CPUs nobody is asked
STACKS_SECONDS = 3.0  # for the ranks of a stuck run to give their stacks: milliseconds, where the machine is not busy


def run(recipe_files: Sequence[str | Path], overrides: Sequence[str], nproc: int | None, dry_run: bool = False) -> int:
    """Train the recipe on this machine with `nproc` workers (None: all visible GPUs, else 1); returns the exit code.

    With `dry_run` prints the resolved recipe and the worker command, and starts nothing.
    """
    recipe = load_recipe(recipe_files, overrides)
    num_processes = choose_num_processes(nproc)
    refuse_uneven(recipe, num_processes)
    run_dir = Path(recipe.run.dir)
    command, nodes = worker_command(run_dir), read_nodes(os.environ)
    if dry_run:
        print(dump_recipe(recipe), end="")
        print(f"# {num_processes} x {shlex.join(command)}")
        return EXIT_DONE
    if nodes.index > 0:
        attempt = join(run_dir, nodes, num_processes)
        return run_share(Job(command, num_processes, run_dir, attempt, nodes), recipe)
    taken = claim(run_dir, sys.argv)
    try:
        if nodes.are_several:
            write_resolved(taken, recipe)
            with hosting(run_dir, nodes, num_processes, taken.attempt):
                lease = taken.lock.lease
                job = Job(command, num_processes, run_dir, taken.attempt, nodes, lease.token)
                return run_share(job, recipe, (taken.lock.fd,), lease.kept())
        return keep_running(taken, recipe, command, num_processes)
    finally:
        taken.lock.release()


def run_share(
    job: Job, recipe: Recipe, inherited: tuple[int, ...] = (), meanwhile: AbstractContextManager[None] | None = None
) -> int:
    """One node's workers of a run over several, once; who started the nodes decides about another attempt."""
    with Stops() as stops:
        return supervise(job, stops, inherited, recipe.resilience.hang_seconds, meanwhile=meanwhile).code


def keep_running(
    taken: Claim, recipe: Recipe, command: tuple[str, ...], num_processes: int, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Attempts, from the claimed one on, until one ends for good; returns the code to exit with. Main thread only."""
    restarts = Restarts(recipe.resilience.max_restarts, newest_step(taken.run_dir))
    with Stops() as stops:
        while True:
            write_resolved(taken, recipe)
            lease = taken.lock.lease
            job = Job(command, num_processes, taken.run_dir, taken.attempt, lease=lease.token)
            inherited, hang_seconds = (taken.lock.fd,), recipe.resilience.hang_seconds
            ending = supervise(job, stops, inherited, hang_seconds, grace_seconds, meanwhile=lease.kept())
            if not ending.may_pass or stops.asked or (taken.run_dir / STOP_NAME).exists():
                return ending.code
            step = newest_step(taken.run_dir)
            code = restarts.refuse(ending, step)
            if code is not None:
                _give_up(taken, ending, restarts, code)
                return code
            recipe, taken = continued(taken, recipe), next_attempt(taken.run_dir, sys.argv, taken.lock)
            append_event(taken.attempt_dir, "restart", after=ending.cause, step=step, number=restarts.used)
            count = f"restart {restarts.used} of {restarts.allowed}"
            _say(f"attempt {taken.attempt - 1} ended ({ending.cause}): going on after step {step}, {count}")


def continued(taken: Claim, recipe: Recipe) -> Recipe:
    """The recipe of the next attempt: `checkpoint.resume: never` has been obeyed once and must not be again."""
    if not has_begun_anew(taken):
        return recipe
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": "auto"})})


def _give_up(taken: Claim, ending: Ending, restarts: Restarts, code: int) -> None:
    append_event(taken.attempt_dir, "gave up", after=ending.cause, restarts=restarts.used, code=code)
    if code == EXIT_NO_PROGRESS:
        why = f"no new checkpoint in {restarts.used} restarts: look at {taken.attempt_dir}, or save more often"
    else:
        why = f"resilience.max_restarts={restarts.allowed} reached: the same command goes on from the last checkpoint"
    _say(f"error: attempt {taken.attempt} ended ({ending.cause}); {why}")


def _say(text: str) -> None:
    print(f"sft-dist: {text}", file=sys.stderr, flush=True)


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


def supervise(
    job: Job,
    stops: Stops,
    inherited: tuple[int, ...] = (),
    hang_seconds: float | Literal["auto"] = "auto",
    grace_seconds: float = GRACE_SECONDS,
    meanwhile: AbstractContextManager[None] | None = None,
) -> Ending:
    """Start the job's workers and stay until all have ended: in order, with one that failed, or for a hang.

    `meanwhile` is entered once they run: it may start threads, which must not exist before the last fork.
    """
    append_event(job.attempt_dir, "start", processes=job.num_processes, node=job.nodes.index, command=list(job.command))
    with Workers(job, inherited) as workers, meanwhile or nullcontext(), Hearing(job) as hearing:
        stops.pass_to(workers)
        watchdog = Watchdog(hang_seconds, time.monotonic())
        failed, is_stuck = None, False
        while workers.are_running and failed is None and not is_stuck:
            failed = workers.wait(LOOK_SECONDS)
            is_stuck = failed is None and (watchdog.finds_hang(workers.beats(), time.monotonic()) or hearing.is_called)
        if is_stuck:
            return end_hang(job, workers, hearing, watchdog.silence_seconds)
        if failed is not None:
            workers.end(grace_seconds)
    ending = how_it_ended(job, workers, failed, was_interrupted=stops.has_killed)
    append_event(job.attempt_dir, "end", code=ending.code, cause=ending.cause, returncodes=workers.returncodes)
    return ending


def end_hang(job: Job, workers: Workers, hearing: Hearing, silence_seconds: float) -> Ending:
    """Take down what every rank of every node says of itself, end ours, and tell the user who held the run up.

    Nothing waits for the disk before the last worker is dead: the run may hang because of it. What can be done at the
    same time is: the other nodes are called before ours are asked, and stacks are written before the others are heard.
    """
    hearing.call()
    records: list[Path] = []
    recording = _aside(lambda: records.extend(workers.records(RECORDS_SECONDS)))
    recorded_by = time.monotonic() + RECORDS_SECONDS + LOOK_SECONDS
    beats, stacks = workers.beats(), workers.stacks(STACKS_SECONDS)
    writing = _aside(lambda: write_stacks(job, stacks))
    now = time.monotonic()  # of this machine: what is told to others counts from it
    witnesses = [
        Witness(job.rank(i), replace(beat, seconds=beat.seconds - now), main_thread(stacks.get(i, "")))
        for i, beat in beats.items()
    ]
    recording.join(recorded_by - time.monotonic())  # who is heard may be ended: its record is to be there by then
    told = hearing.hear(silence_seconds, witnesses)
    workers.kill()
    line = _hang_line(told)
    if told.speaker == job.nodes.index:  # said before the wait: one that is stuck in the kernel may never be gone
        collectives = f", NCCL's last collectives in {job.attempt_dir}/{DUMP_PREFIX}*" if records else ""
        _say(f"error: {line}; all are being ended, stacks in {job.attempt_dir}/rank_*.stacks.txt{collectives}")
    while workers.are_running:
        workers.wait()
    writing.join()
    write_exit_code(job.attempt_dir, EXIT_HANG)
    if told.speaker == job.nodes.index:
        append_event(job.attempt_dir, "hang", cause=line, ranks={w.rank: str(w) for w in told.witnesses})
    append_event(job.attempt_dir, "end", code=EXIT_HANG, cause="hang", returncodes=workers.returncodes)
    return Ending(EXIT_HANG, "hang")


def write_stacks(job: Job, stacks: Mapping[int, str]) -> None:
    """One file for each worker that was asked, by its index on this machine."""
    try:
        for index, text in stacks.items():
            job.stacks_path(job.rank(index)).write_text(
                text or "no answer: the process was stopped, or stuck in the kernel\n"
            )
    except OSError as error:
        _say(f"warning: {job.attempt_dir}: the stacks cannot be written ({error.strerror})")


def _aside(action: Callable[[], object]) -> threading.Thread:
    """`action` in a thread that nobody has to wait for: the disk it touches may not answer."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def _hang_line(told: Testimony) -> str:
    """Who holds the run up, and which nodes have not told what their ranks do."""
    line = accuse(told.witnesses, told.silence_seconds)
    return f"{line}; {no_word_from(told.missing)}" if told.missing else line
