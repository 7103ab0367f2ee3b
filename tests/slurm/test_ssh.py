"""Several machines without a scheduler: launch/ssh.sh over real sshds, one in each virtual node, and a bad network.

The nodes are those of the Slurm fixture; Slurm takes no part.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from slurm.submitted import TINY, Submitted, files_with, secret_of, workers
from tiny_run import ROOT, lines, weights, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def hosts(cluster: Cluster) -> Iterator[tuple[Path, str]]:
    """(host file, ssh command) for two nodes of the cluster, each with a running sshd."""
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("no sshd here (apt-get install openssh-server openssh-client)")
    folder = cluster.folder / "ssh"
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    for index, node in enumerate(cluster.nodes[:2]):
        (folder / f"{node}.conf").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile {folder}/{node}.pid\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n"
        )
        one_core = ("taskset", "-c", str(index % len(os.sched_getaffinity(0))))  # as in the jobs of submitted.py
        sshd = ("/usr/sbin/sshd", "-f", folder / f"{node}.conf", "-E", folder / f"{node}.log")
        cluster.run(*one_core, *sshd, node=node)
    host_file = folder / "hosts"
    host_file.write_text("# rank 0 first\n" + "".join(f"{node} slots=1\n" for node in cluster.nodes[:2]))
    options = (
        f"-T -F none -i {folder}/user -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    )
    yield host_file, f"ssh {options} -o LogLevel=ERROR -o ServerAliveInterval=2 -o ServerAliveCountMax=3"


class Launched:
    """launch/ssh.sh running on the controller."""

    def __init__(self, cluster: Cluster, hosts: tuple[Path, str], recipe: Path, **env: str) -> None:
        host_file, ssh = hosts
        self.run_dir = recipe.with_suffix("")
        self.output = recipe.with_suffix(".out")
        given = {
            "SFT_SSH": ssh, "SFT_PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "SFT_GRACE_SECONDS": "5",
        }  # fmt: skip
        command = cluster.inside("bash", ROOT / "launch" / "ssh.sh", host_file, recipe, cwd=recipe.parent)
        command.insert(1, "--no-fork")  # so that this process becomes ssh.sh, and signals reach it
        with self.output.open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=cluster.environment(**given | env), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def wait_for_steps(self, number: int, *, attempt: int = 1) -> None:
        """Until that attempt has taken so many steps: lines of an earlier one stay in the file until it is resumed."""
        own = lambda: [line for line in lines(self.run_dir, "step") if line["attempt"] == attempt]  # noqa: E731
        Cluster.wait(lambda: len(own()) >= number or self.process.poll() is not None, 120, "a step")
        assert self.process.poll() is None, self.output.read_text()[-4000:]

    def code(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(120)

    def kill(self) -> None:
        """SIGKILL to ssh.sh itself (nsenter has become it)."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def launch(cluster: Cluster, hosts: tuple[Path, str], tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """`launch("name", resilience={...})`: a tiny run over two machines."""
    started: list[Launched] = []

    def begin(name: str, env: dict[str, str] | None = None, **changes: dict[str, Any]) -> Launched:
        sections = {key: TINY.get(key, {}) | changes.get(key, {}) for key in {*TINY, *changes}}
        started.append(Launched(cluster, hosts, write_recipe(tmp_path, name, **sections), **env or {}))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()


def test_a_recipe_that_says_ssh_goes_there_by_itself(
    cluster: Cluster, hosts: tuple[Path, str], tmp_path: Path, uninterrupted: Submitted
) -> None:
    where = {"target": "ssh", "hosts": cluster.nodes[:2], "processes_per_node": 1, "preflight": False}
    recipe = write_recipe(tmp_path, "over", **TINY, cluster=where)
    env = {"SFT_SSH": hosts[1], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    command = (sys.executable, "-m", "sft_dist", "train", recipe)
    done = cluster.run(*command, cwd=tmp_path, timeout=240, check=False, CUDA_VISIBLE_DEVICES="", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path / "over") == uninterrupted.result


def result(run_dir: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Steps and weights, as `Submitted.result` gives them."""
    steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run_dir, "step")]
    return steps, weights(run_dir)


@pytest.mark.faults
def test_over_ssh_a_stop_and_a_slow_link_that_breaks_change_nothing(
    cluster: Cluster, launch: Callable[..., Launched], uninterrupted: Submitted
) -> None:
    """Stopped by a signal, then on a slow link whose plug is pulled and put back: the weights of the Slurm run."""
    first = launch("ssh", env={"SFT_PREFLIGHT": "1"})
    first.wait_for_steps(2)
    secret = secret_of(cluster, cluster.nodes[:2])
    first.wait_for_steps(4)
    first.process.send_signal(signal.SIGTERM)
    assert first.code() == 75, first.output.read_text()
    assert "2 nodes, 0 complaints" in first.output.read_text()
    assert secret not in first.output.read_text() and not files_with(first.run_dir, secret)

    victim, slow = cluster.nodes[1], ("tbf", "rate", "4mbit", "burst", "16kbit", "latency", "2s")
    cluster.run("tc", "qdisc", "add", "dev", "eth0", "root", *slow, node=victim)
    second = launch("ssh")
    second.wait_for_steps(2, attempt=2)
    cluster.link(victim, "down")  # what was lost is sent again
    cluster.link(victim, "up")
    second.wait_for_steps(4, attempt=2)
    cluster.run("tc", "qdisc", "del", "dev", "eth0", "root", node=victim)
    assert second.code() == 0, second.output.read_text()
    assert result(second.run_dir) == uninterrupted.result


@pytest.mark.faults
def test_a_killed_ssh_sh_leaves_nothing_behind_and_the_run_goes_on(
    cluster: Cluster, launch: Callable[..., Launched], uninterrupted: Submitted
) -> None:
    first = launch("killed")
    first.wait_for_steps(12)
    first.kill()
    cluster.wait(lambda: not any(workers(cluster, node) for node in cluster.nodes), 15, "workers gone")
    second = launch("killed")
    assert second.code() == 0, second.output.read_text()
    assert result(second.run_dir) == uninterrupted.result


@pytest.mark.faults
def test_a_cut_link_ends_the_run_with_71_on_both_sides_and_it_continues(
    cluster: Cluster, launch: Callable[..., Launched], uninterrupted: Submitted
) -> None:
    patience = {"resilience": {"hang_seconds": 10.0}}
    run = launch("cut", env={"SFT_GRACE_SECONDS": "60"}, **patience)  # the watchdogs are to come first
    run.wait_for_steps(12)
    victim = cluster.nodes[1]
    cluster.link(victim, "down")
    try:
        assert run.code() == 71, run.output.read_text()
        cluster.wait(lambda: not any(workers(cluster, node) for node in cluster.nodes), 30, "workers gone")
    finally:
        cluster.link(victim, "up")
    (told,) = re.findall("hang: no sign of life.*", run.output.read_text())  # one, for the nodes have told each other
    assert re.search(r"ranks 0, 1: step 1\d|rank 0: step 1\d.*rank 1: step 1\d", told), told
    stacks = sorted(path.name for path in (run.run_dir / "logs" / "attempt_0001").glob("*.stacks.txt"))
    assert stacks == ["rank_00000.stacks.txt", "rank_00001.stacks.txt"]
    again = launch("cut", **patience)
    assert again.code() == 0, again.output.read_text()
    assert result(again.run_dir) == uninterrupted.result
