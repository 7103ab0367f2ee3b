"""What one machine is to run: the worker command, how many, in which environment. Values only; nothing starts here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.errors import ConfigError
from sft_dist.launch.nodes import ALONE, Nodes
from sft_dist.resilience.lease import LEASE_VARIABLE
from sft_dist.resilience.run_folder import attempt_dir

RESOLVED_NAME = "config.yaml"
LOOPBACK = "lo"
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Job:
    """`num_processes` copies of `command` that write into `run_dir`, whose attempt folder exists already.

    Processes are counted on this machine, by index; with several nodes their ranks go on from node to node.
    """

    command: tuple[str, ...]
    num_processes: int
    run_dir: Path
    attempt: int
    nodes: Nodes = ALONE
    lease: str = ""  # token of the run folder's lease

    @property
    def world_size(self) -> int:
        return self.num_processes * self.nodes.count

    def rank(self, index: int) -> int:
        """The rank of the worker that is `index` on this machine."""
        return self.nodes.index * self.num_processes + index

    @property
    def attempt_dir(self) -> Path:
        return attempt_dir(self.run_dir, self.attempt)

    def log_path(self, rank: int) -> Path:
        """Where the output of `rank` goes."""
        return self.attempt_dir / f"rank_{rank:05d}.log"

    def stacks_path(self, rank: int) -> Path:
        """Where the Python stacks of `rank` go when the run hangs."""
        return self.attempt_dir / f"rank_{rank:05d}.stacks.txt"

    def environment(self, index: int, base: Mapping[str, str]) -> dict[str, str]:
        """What worker `index` finds: its place, and where the ranks meet."""
        kept = {name: value for name, value in base.items() if name not in _FOREIGN}
        return (
            self._confinement()
            | kept
            | self._meeting_point()
            | {
                "RANK": str(self.rank(index)),
                "LOCAL_RANK": str(index),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.num_processes),
                "SFT_ATTEMPT": str(self.attempt),
                "SFT_EXIT_CODE_FILE": str((self.attempt_dir / "exit_code").absolute()),
                "SFT_RUN_LOCKED": "1",
                LEASE_VARIABLE: self.lease,
            }
        )

    def _confinement(self) -> dict[str, str]:
        """On one machine nobody outside may connect to what gloo and NCCL open; set these yourself to overrule."""
        if self.nodes.are_several:
            return {}
        return {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}

    def _meeting_point(self) -> dict[str, str]:
        """A file on one machine, so that no port is opened; over several, rank 0's address."""
        if self.nodes.are_several:
            address = {"MASTER_ADDR": self.nodes.address, "MASTER_PORT": str(self.nodes.port)}
            return address | {"SFT_RENDEZVOUS": "env://"}
        return {"SFT_RENDEZVOUS": f"file://{(self.attempt_dir / 'rendezvous').absolute()}"}


def worker_command(run_dir: Path) -> tuple[str, ...]:
    """How a worker is started: this Python, the resolved recipe, nothing else."""
    return (sys.executable, "-u", "-m", "sft_dist.train", "--resolved", str(run_dir / RESOLVED_NAME))


def choose_num_processes(requested: int | None, environ: Mapping[str, str] | None = None) -> int:
    """`requested`, else one process per visible GPU, else one. Raises ConfigError below 1."""
    if requested is not None:
        if requested < 1:
            raise ConfigError(f"--nproc {requested}: must be at least 1")
        return requested
    return max(1, count_gpus(os.environ if environ is None else environ))


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs this process may use: CUDA_VISIBLE_DEVICES where set, else what nvidia-smi or /dev shows. Needs no torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    present = _present_gpus()
    if visible is None:
        return present
    named = [word.strip() for word in visible.split(",")]
    usable = named[: named.index("-1")] if "-1" in named else [word for word in named if word]
    return min(len(usable), present)


def _present_gpus() -> int:
    if shutil.which("nvidia-smi"):
        listed = _run_quietly(("nvidia-smi", "-L"))
        if listed is not None:
            return sum(line.startswith("GPU ") for line in listed.splitlines())
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _run_quietly(command: Sequence[str]) -> str | None:
    """Standard output, or None when the program fails or takes over 20 seconds (a driver that hangs)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
