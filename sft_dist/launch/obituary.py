"""How an attempt ended, from its workers' return codes: the code to exit with, who is to blame, in words."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from sft_dist import errors
from sft_dist.errors import EXIT_DONE, EXIT_STOPPED
from sft_dist.launch.job import Job
from sft_dist.launch.restarts import Ending
from sft_dist.launch.workers import Workers
from sft_dist.resilience.run_folder import read_exit_code

EXIT_CODES = (
    errors.EXIT_USAGE,
    errors.EXIT_DATA,
    errors.EXIT_NONFINITE,
    errors.EXIT_HANG,
    errors.EXIT_LOCKED,
    errors.EXIT_STORAGE,
    errors.EXIT_STOPPED,
)
TAIL_LINES = 20
# A worker that listens never dies of these: it was still preparing, had nothing to save, and can be started again.
# SIGINT is none of them: the second one is meant to end it.
ASKED_EARLY = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})


def how_it_ended(job: Job, workers: Workers, failed: int | None, *, was_interrupted: bool = False) -> Ending:
    """The code to exit with, and which worker is to blame: the one that `failed` first, unless another was killed.

    When a rank is killed its peers fail as well, of the broken connection, and may be noticed first. None is to blame
    where `was_interrupted` says that the user had all of them killed.
    """
    returncodes = workers.returncodes
    if failed is None:
        return Ending(exit_code(job, returncodes), "in order")
    if was_interrupted:
        print("sft-dist: ended by the second Ctrl-C", file=sys.stderr, flush=True)
        return Ending(exit_code(job, returncodes), "second Ctrl-C")
    if (returncodes[failed] or 0) > 0 and exit_code(job, returncodes, failed) == 1:
        killed = workers.killed_by_others()
        failed = failed if killed is None else killed
    returncode = returncodes[failed] or 0
    code = exit_code(job, returncodes, failed)
    if code == 1 and -returncode in ASKED_EARLY:
        early = f"rank {failed} was asked to stop ({_cause(returncode)}) before it could listen"
        print(f"sft-dist: {early}: the same command goes on", file=sys.stderr, flush=True)
        code = EXIT_STOPPED
    elif failed > 0 or returncode != code:
        print(obituary(job, failed, returncode), file=sys.stderr, flush=True)
    return Ending(code, f"rank {job.rank(failed)} died {_cause(returncode)}", -returncode if returncode < 0 else None)


def exit_code(job: Job, returncodes: Sequence[int | None], failed: int | None = None) -> int:
    """The worker's word in `exit_code`, unless it says done and yet a worker failed; else the code of the worker that
    `failed` first, or of any other, if it is one of ours (a full disk leaves no file, and a peer may be noticed first);
    else 1. The word is rank 0's: on other nodes none is needed."""
    left = read_exit_code(job.attempt_dir)
    if left is None and job.nodes.index > 0:
        left = EXIT_DONE
    if left is not None and (left != EXIT_DONE or not any(returncodes)):
        return left
    candidates = [] if failed is None else [returncodes[failed], *returncodes]
    return next((code for code in candidates if code in EXIT_CODES), 1)


def obituary(job: Job, index: int, returncode: int) -> str:
    """Which worker died first, of what, and, where the terminal has not shown it, the end of its log."""
    rank = job.rank(index)
    log = job.log_path(rank)
    head = f"rank {rank} of {job.world_size} died {_cause(returncode)} and the others were ended; see {log}"
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if index > 0 else []
    return "\n".join([f"sft-dist: error: {head}", *(f"  | {line}" for line in lines)])


def _cause(returncode: int) -> str:
    return f"of {signal.Signals(-returncode).name}" if returncode < 0 else f"with code {returncode}"
