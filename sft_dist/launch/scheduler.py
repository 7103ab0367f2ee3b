"""Asking Slurm: submit, state of a job. Plain commands, so nothing but Slurm's client must be there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from sft_dist.errors import ConfigError

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
_SECONDS = 60


def ask(words: Sequence[str], *, check: bool = True) -> str:
    """Standard output of a Slurm command. Raises ConfigError with what it said when it fails."""
    if shutil.which(words[0]) is None:
        raise ConfigError(f"{words[0]}: not in PATH: run this where Slurm's client is installed (a login node)")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{words[0]}: no answer within {_SECONDS} s: is the controller down?") from error
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        why = said[-1].removeprefix(f"{words[0]}: ").removeprefix("error: ") if said else f"exit {done.returncode}"
        raise ConfigError(f"{words[0]}: {why}")
    return done.stdout


def submit(command: Sequence[str]) -> str:
    """Hand a job over; returns its id."""
    return ask(command).split(";")[0].strip()


def records(job: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, one record for each task of an array; none when it has forgotten it.

    `scontrol` keeps ended jobs for MinJobAge; after that only accounting, where there is one, knows them.
    """
    lines = ask(["scontrol", "show", "job", "-o", job], check=False).splitlines()
    found = [_fields(line) for line in lines if "JobId=" in line]
    return found or _accounted(job)


def _fields(line: str) -> dict[str, str]:
    """The first value of each name: names of files, which may hold anything, come last."""
    pairs = [word.partition("=")[::2] for word in line.split() if "=" in word]
    return dict(reversed(pairs))


def _accounted(job: str) -> list[dict[str, str]]:
    if shutil.which("sacct") is None:
        return []
    names = ("JobId", "JobState", "RunTime", "NodeList", "ExitCode")
    told = ask(["sacct", "-XnPj", job, "-o", "JobID,State,Elapsed,NodeList,ExitCode"], check=False)
    return [dict(zip(names, line.split("|"), strict=False)) for line in told.splitlines() if line.count("|") == 4]


def has_ended(record: dict[str, str]) -> bool:
    """Whether a job will not run again by itself, or is one that Slurm has forgotten."""
    return record["JobState"].split()[0] in ENDED | {"UNKNOWN"}
