"""launch/worker.sh: the environment of a fabric, values that are not words of it, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from sft_dist.config.shipped import CHECKOUT

WORKER = CHECKOUT / "launch" / "worker.sh"
ENV_FILES = sorted((CHECKOUT / "launch" / "env").glob("*.env"))
SECOND = {"SFT_NNODES": "2", "SFT_NODE_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "SFT_NPROC": "1"}


def begin(tmp_path: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """worker.sh with a program in Python's place that prints its environment."""
    shown = tmp_path / "python"
    shown.write_text("#!/bin/sh\nexec env\n")
    shown.chmod(0o755)
    kept = {"PATH": os.environ["PATH"], "SFT_PYTHON": str(shown)}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", WORKER, *words], env=kept | env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The same from its start to its end, with nothing on standard input."""
    with begin(tmp_path, *words, **env) as started:
        out, err = started.communicate(timeout=60)
    return subprocess.CompletedProcess(words, started.returncode, out, err)


def environment(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines())


@pytest.mark.parametrize("path", ENV_FILES, ids=lambda path: path.stem)
def test_every_line_of_a_fabric_has_its_reason_and_reaches_the_workers(path: Path, tmp_path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Z][A-Z0-9_]*)=(\S+)  # \S.{10,}", line) for line in lines]
    assert lines and all(pairs), lines
    told = environment(run(tmp_path, "r.yaml", SFT_FABRIC=path.stem, **SECOND))
    assert {match[1]: match[2] for match in pairs if match}.items() <= told.items()


def test_what_the_user_has_set_is_kept_and_one_node_has_no_fabric(tmp_path: Path) -> None:
    told = environment(run(tmp_path, "r.yaml", SFT_FABRIC="ethernet", NCCL_DEBUG="INFO", **SECOND))
    assert told["NCCL_DEBUG"] == "INFO" and told["NCCL_IB_DISABLE"] == "1"
    assert "NCCL_DEBUG" not in environment(run(tmp_path, "r.yaml", SFT_FABRIC="ethernet", SFT_NPROC="1"))
    assert "NCCL_DEBUG" not in environment(run(tmp_path, "r.yaml", SFT_FABRIC="none", **SECOND))


def test_who_guards_by_standard_input_hands_over_the_secret(tmp_path: Path) -> None:
    """The first line is taken and no further one: those ask for a stop, and the end of it all ends the run."""
    with begin(tmp_path, "r.yaml", SFT_GUARD="stdin", **SECOND) as started:
        assert started.stdin and started.stdout
        started.stdin.write("5ec7e7\n")
        started.stdin.flush()  # and stays open
        assert "SFT_RUN_SECRET=5ec7e7\n" in started.stdout.readlines()
    assert started.returncode == 0
    silent = run(tmp_path, "r.yaml", SFT_GUARD="stdin", **SECOND)
    assert silent.returncode == 2 and "its first line is missing" in silent.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SFT_FABRIC": "../x"}, "SFT_FABRIC=../x: must be auto, none or one of"),
        ({"SFT_LAUNCHER": "mpirun"}, "SFT_LAUNCHER=mpirun: must be local, torchrun, accelerate or deepspeed"),
        ({"SFT_LAUNCHER": "deepspeed"}, "SFT_LAUNCHER=deepspeed starts one node only"),
        ({"MASTER_ADDR": ""}, "SFT_NNODES=2 needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, str], said: str, tmp_path: Path) -> None:
    done = run(tmp_path, "r.yaml", **SECOND | changes)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_ssh_sh_refuses_names_that_are_none(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    for line, said in (
        ("-oProxyCommand=x", "not the name of a machine"),
        ("n1 gpus=2", "write slots=N"),
        ("#", "no machine"),
    ):
        hosts.write_text(line + "\n")
        command = ["bash", str(WORKER.with_name("ssh.sh")), str(hosts), "r.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and said in done.stderr


def test_ssh_sh_hands_the_interface_on_and_shows_nobody_the_secret(tmp_path: Path) -> None:
    """The remote command line is on show on both machines; what a stranger would need is not in it."""
    hosts = tmp_path / "hosts"
    hosts.write_text("n1\nn2\n")
    env = {"PATH": os.environ["PATH"], "SFT_SSH": "echo", "GLOO_SOCKET_IFNAME": "ib0"}
    command = ["bash", str(WORKER.with_name("ssh.sh")), str(hosts), "r.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    for number, line in enumerate(sorted(lines)):
        assert line.startswith(f"n{number + 1} ") and f" SFT_NODE_RANK={number} " in line
        assert " GLOO_SOCKET_IFNAME=ib0 " in line and "SFT_RUN_SECRET" not in line
        assert 20000 <= int(line.partition(" MASTER_PORT=")[2].split()[0]) < 30000
