"""A worker that srun started by itself: `srun --ntasks-per-node=8 sft-dist train R.yaml`, one task per rank.

Slurm says where a task stands in SLURM_* variables; workers read RANK and its relatives. Only a *step* of several tasks
counts: in a batch script or under salloc, SLURM_PROCID and SLURM_NTASKS may be there as well and mean something else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping

from sft_dist.errors import ConfigError

FIRST_PORT, NUM_PORTS = 20000, 10000
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def is_srun_task(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step, and no launcher stands between srun and it."""
    has_launcher = "RANK" in environ or "SFT_NNODES" in environ
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not has_launcher


def adopt_srun(environ: MutableMapping[str, str]) -> None:
    """Put RANK and its relatives into `environ` for a task of srun; other processes are left alone."""
    if is_srun_task(environ):
        environ.update(place_of_task(environ))


def place_of_task(environ: Mapping[str, str]) -> dict[str, str]:
    """Rank, sizes and meeting point of a task. Raises ConfigError when the first node's name cannot be had."""
    per_node = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_node(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port_of(environ)),
    }


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = _REPEATED.fullmatch(part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text}: not in Slurm's form: start the task with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def port_of(environ: Mapping[str, str]) -> int:
    """A port that steps of this job and other jobs on the node are unlikely to use."""
    number = 7 * int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + number % NUM_PORTS


def first_node(node_list: str) -> str:
    """The first name of a node list such as `gpu[003-010],cpu1`, as Slurm itself expands it."""
    if not re.search(r"[\[,]", node_list):
        return node_list
    if shutil.which("scontrol") is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={node_list}: scontrol is not in PATH here: set MASTER_ADDR")
    told = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, timeout=30)
    if told.returncode or not told.stdout.strip():
        raise ConfigError(f"SLURM_STEP_NODELIST={node_list}: scontrol cannot expand it: set MASTER_ADDR")
    return told.stdout.split()[0]
