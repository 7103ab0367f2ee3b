"""A worker dies with its parent and with every launcher above it; what counts as a launcher is read from argv."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_dist.resilience.orphan import ancestors, is_launcher

PYTHON = "/venv/bin/python3"
LAUNCHERS = [
    "/venv/bin/torchrun --nproc-per-node 2 -m sft_dist.train R.yaml",
    f"{PYTHON} /venv/bin/torchrun --nproc-per-node 2 -m x",
    f"{PYTHON} -m torch.distributed.run -m x",
    f"{PYTHON} -u -X dev -W ignore -m torch.distributed.run -m x",
    f"{PYTHON} -um torch.distributed.run -m x",
    f"{PYTHON} /venv/bin/accelerate launch -m x",
    f"{PYTHON} -m accelerate.commands.launch -m x",
    f"{PYTHON} /venv/bin/deepspeed --module x",
    f"{PYTHON} -u -m deepspeed.launcher.launch --world_info=e30 --module x",
    f"{PYTHON} /venv/bin/sft-dist train R.yaml",
    f"{PYTHON} -m sft_dist.cli.main train R.yaml",
    "bash launch/worker.sh R.yaml",
    "/usr/bin/bash -x /repo/launch/worker.sh R.yaml",
]
OTHERS = [
    "",
    "bash -c torchrun",
    "bash -c worker.sh",
    "bash train.sh launch/worker.sh",
    f"{PYTHON} -m pytest tests/distributed/test_entries.py",
    f"{PYTHON} -m torch.utils.collect_env torchrun",
    f"{PYTHON} -m sft_distribution",
    f"{PYTHON} notebook.py torchrun",
    f"{PYTHON} -c pass torchrun",
    "timeout 60 torchrun -m x",
    "slurmstepd: [12.0]",
    "sshd: user",
]


@pytest.mark.parametrize("line", LAUNCHERS)
def test_launchers_are_recognised(line: str) -> None:
    assert is_launcher(line.split())


@pytest.mark.parametrize("line", OTHERS)
def test_other_programs_are_not(line: str) -> None:
    assert not is_launcher(line.split())


def test_ancestors_start_at_the_parent_and_end_at_the_first_process() -> None:
    chain = [process.pid for process in ancestors()]
    assert chain[0] == os.getppid()
    assert len(set(chain)) == len(chain)


WORKER = """
import os, sys, time
from sft_dist.resilience.orphan import die_with_ancestors
watched = die_with_ancestors()
print(os.getpid(), len(watched), flush=True)
time.sleep(60)
"""
# The shape of DeepSpeed: a runner starts a launcher which starts the worker; each only waits for its child.
STARTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))\n"


def start_chain(folder: Path, names: list[str]) -> tuple[subprocess.Popen[str], list[int], int]:
    """Nested processes with these script names and the worker at the end; returns (top, pids from the top, watched)."""
    command = [sys.executable, "-c", WORKER]
    for name in reversed(names):
        (folder / name).write_text(STARTER)
        command = [sys.executable, str(folder / name), *command]
    top = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert top.stdout is not None
    worker, watched = map(int, top.stdout.readline().split())
    pids = [process.pid for process in ancestors(worker)]
    return top, [*reversed(pids[: pids.index(top.pid) + 1]), worker], watched


def is_gone(pid: int) -> bool:
    """Ended, perhaps not yet collected by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_gone(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(
    ("names", "killed", "num_watched"),
    [
        (["deepspeed", "torchrun"], 0, 2),
        (["deepspeed", "torchrun"], 1, 2),
        (["sft-dist"], 0, 1),
        (["deepspeed", "wrapper.py", "numactl.py"], 0, 1),
        (["plain.py"], 0, 0),
    ],
    ids=["grandparent", "parent of two", "parent", "beyond two wrappers", "parent that is no launcher"],
)
def test_sigkill_of_a_launcher_ends_the_worker(tmp_path: Path, names: list[str], killed: int, num_watched: int) -> None:
    top, pids, watched = start_chain(tmp_path, names)
    try:
        assert watched == num_watched
        os.kill(pids[killed], signal.SIGKILL)
        assert wait_until_gone(pids[-1])
    finally:
        for pid in reversed(pids[1:]):
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        top.kill()
        top.wait()


def test_a_wrapper_above_that_is_no_launcher_may_go(tmp_path: Path) -> None:
    top, pids, _ = start_chain(tmp_path, ["shell.py", "torchrun"])
    try:
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(0.3)
        assert not is_gone(pids[-1])
    finally:
        os.kill(pids[1], signal.SIGKILL)
        assert wait_until_gone(pids[-1])
        top.wait()


def test_a_worker_whose_launcher_is_gone_already_ends_at_once() -> None:
    program = (
        "import os\n"
        "import sft_dist.resilience.orphan as orphan\n"
        "orphan.os.getppid = lambda: 1\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'x'\n"
        "orphan.ancestors = lambda: []\n"
        "orphan.die_with_ancestors()\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == ""
