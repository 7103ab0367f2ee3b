"""`sft-dist doctor --cluster` on three real nodes, of which some are bad: each fault is put in and must be named.

A fault is put into one node only: by namespaces of its own around Python (another file under a name, no hosts file, no
network), a module that Python loads first (a wrong clock, wrong sums), or the node's network device (a slow link).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.submitted import Submitted
from tiny_run import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CLOCK = "import time\nnow = time.time\ntime.time = lambda: now() + 9\n"
SUMS = """
import torch.distributed as dist
right = dist.all_reduce
def all_reduce(tensor, *args, **kwargs):
    right(tensor, *args, **kwargs)
    tensor[:3] += 1
dist.all_reduce = all_reduce
"""
METADATA = "Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n"
TAKE_PORT = "import socket, sys, time; s = socket.socket(); s.bind(('', int(sys.argv[1]))); s.listen(); time.sleep(99)"


class Sick:
    """Setup lines that make nodes of a job sick."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.lines = folder, list[str]()
        folder.mkdir()

    def does(self, node: str, line: str) -> None:
        self.lines.append(f"if [[ $SLURMD_NODENAME == {node} ]]; then {line}; fi")

    def loads(self, node: str, code: str) -> None:
        """Python of the node runs `code` before anything else."""
        place = self._folder / f"first-{node}"
        place.mkdir()
        (place / "sitecustomize.py").write_text(code)
        self.does(node, f"export PYTHONPATH={place}:$PYTHONPATH")

    def stands_apart(self, node: str, namespaces: str, command: str = ":", search: str = "$PYTHONPATH") -> None:
        """Python of the node starts in `namespaces` of its own, after `command`."""
        program = self._folder / f"python-{node}"
        inner = f'{command}; export PYTHONPATH={search}; exec {sys.executable} "$@"'
        program.write_text(f"#!/bin/bash\nexec unshare {namespaces} bash -c '{inner}' bash \"$@\"\n")
        program.chmod(0o755)
        self.does(node, f"export SFT_PYTHON={program}")


def examine(run: Submitted, seconds: float = 30) -> set[tuple[str, str]]:
    """(node, what is wrong with it), as told to the user within `seconds`."""
    done = run.sft("doctor", "--cluster", run.recipe, code=77)
    (path,) = (run.run_dir / "logs").glob("preflight-*/report.json")
    report = json.loads(path.read_text())
    told = {(c["name"], c["what"]) for c in report["complaints"]}
    assert all(f"node {name}: {what}" in done.stderr for name, what in told), done.stderr
    line = next(line for line in run.log().splitlines() if " complaints" in line)
    assert float(line.rpartition(", ")[2].removesuffix(" s")) < seconds, line
    return told


def names(told: set[tuple[str, str]], *expected: tuple[str, str]) -> None:
    """Exactly these complaints, each known by its first words."""
    found = sorted(told)
    assert len(found) == len(expected), found
    for name, words in expected:
        assert any(who == name and what.startswith(words) for who, what in found), (name, words, found)


@pytest.fixture
def bad(prepare_run: Callable[..., Submitted]) -> Callable[..., Submitted]:
    """`bad("name", sick)`: a run on three nodes with its setup lines."""
    return lambda name, sick: prepare_run(name, cluster={"nodes": 3, "preflight": True, "setup": sick.lines})


def test_another_code_version_file_and_clock_and_a_taken_port_are_named(
    cluster: Cluster, bad: Callable[..., Submitted], tmp_path: Path
) -> None:
    """Within half a minute."""
    first, second, third = cluster.nodes
    other = tmp_path / "other"
    shutil.copytree(ROOT / "sft_dist", other / "sft_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "sft_dist" / "errors.py").open("a").write("# edited on one node only\n")
    (other / "transformers-0.1.dist-info").mkdir()
    (other / "transformers-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n"
    )
    (other / "data.json").write_text("[]")

    sick = Sick(tmp_path / "facts")
    data = bad("facts", sick).recipe.parent / "data.json"
    sick.does(first, f'{sys.executable} -c "{TAKE_PORT}" $MASTER_PORT 2>/dev/null & sleep 0.5')
    sick.stands_apart(second, "--mount", f"mount --bind {other}/data.json {data}", f"{other}:$PYTHONPATH")
    sick.loads(third, CLOCK)
    names(
        examine(bad("facts", sick)),
        (first, "cannot listen on port"),
        (second, "sft_dist is"),
        (second, "transformers is 0.1, on the others"),
        (second, f"view of {data} is 1 files, 2 bytes"),
        (third, "clock is +9.0 s off"),
    )


@pytest.mark.faults
def test_a_node_without_names_and_one_without_network_are_named(
    cluster: Cluster, bad: Callable[..., Submitted], tmp_path: Path
) -> None:
    first, second, third = cluster.nodes
    sick = Sick(tmp_path / "network")
    sick.stands_apart(second, "--mount", "mount --bind /dev/null /etc/hosts")
    sick.stands_apart(third, "--net")
    names(
        examine(bad("network", sick)),
        (second, f"does not know the name {first}"),
        (third, f"cannot reach {first} port"),
    )


@pytest.mark.faults
def test_a_slow_link_and_wrong_sums_are_named(cluster: Cluster, bad: Callable[..., Submitted], tmp_path: Path) -> None:
    second, third = cluster.nodes[1:]
    sick = Sick(tmp_path / "speed")
    sick.loads(third, SUMS)
    slow = ("dev", "eth0", "root", "tbf", "rate", "3mbit", "burst", "16kbit", "latency", "2s")
    cluster.run("tc", "qdisc", "add", *slow, node=second)
    try:
        with cluster.full_speed():
            told = examine(bad("speed", sick))
    finally:
        cluster.run("tc", "qdisc", "del", "dev", "eth0", "root", node=second)
    names(told, (second, "its link does 0."), (third, "all-reduce: 3 of 262144 sums are wrong"))


@pytest.mark.faults  # a node that says nothing is waited for, for a minute
def test_a_node_that_cannot_write_is_named_by_itself_and_by_the_first(
    cluster: Cluster, bad: Callable[..., Submitted], tmp_path: Path
) -> None:
    sick = Sick(tmp_path / "silent")
    run = bad("silent", sick)
    folder = run.recipe.parent
    read_only = f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}"
    sick.stands_apart(cluster.nodes[2], "--mount", read_only)
    run = bad("silent", sick)
    names(examine(run, 90), (cluster.nodes[2], "said nothing"))
    assert f"preflight: node {cluster.nodes[2]}: run.dir={run.run_dir}: Read-only file system" in run.log()
