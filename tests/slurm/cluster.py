"""A real Slurm on one machine: munged, slurmctld and one slurmd per virtual node, each node in namespaces of its own.

One PID, mount, network and UTS namespace holds everything; each node has a network namespace (own address, loopback
and ports) and a UTS namespace (own host name) besides. A shell is process 1 of it and reads its stdin: when the test
ends, in whatever way, the kernel ends every daemon, step and worker with that shell. Nothing outside is changed.

Needs Debian's slurmctld, slurmd, slurm-client, munge, iproute2 and util-linux, and root. `proctrack/cgroup` is used
where the freezer can be reached: only with it do signals go where they go on production clusters (to the task that
Slurm itself started, and not to its children).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "unshare", "nsenter")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
FREEZER = Path("/sys/fs/cgroup/freezer")
SUBNET = "10.77.0"
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})
POLL_SECONDS = 0.05
CRED_EXPIRE = 5  # seconds, the least there is; a requeued job waits that long and one more, 121 s by default

# config_overrides: nodes may claim more cores and memory than this machine has.
CONF = """\
ClusterName=test
SlurmctldHost=ctl({subnet}.1)
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP PreemptMode=OFF
"""

# 16 Mbit/s to each node: gradients take 50 ms, so a step is never faster than a test can look and act.
PACE = "tbf rate 16mbit burst 32kbit latency 1s"

START = r"""
set -e
folder=$1; subnet=$2; pace=$3; shift 3
mount --make-rprivate /
mount -t tmpfs none "$folder/ns"  # the handles of the nodes' namespaces live and die here
mount --bind "$folder/hosts" /etc/hosts
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add "$subnet.1/24" dev br0
ip link set br0 up
last=10
for node in "$@"; do
  last=$((last + 1))
  touch "$folder/ns/net-$node" "$folder/ns/uts-$node"
  unshare --net="$folder/ns/net-$node" --uts="$folder/ns/uts-$node" hostname "$node"
  ip link add "v-$node" type veth peer name eth0
  nsenter --net="$folder/ns/net-$node" sleep 60 & inside=$!
  until [ "$(readlink /proc/$inside/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.005; done
  ip link set eth0 netns $inside
  kill $inside; wait $inside 2>/dev/null || true
  ip link set "v-$node" master br0 up
  tc qdisc add dev "v-$node" root $pace 2>/dev/null || true  # where the kernel can
  nsenter --net="$folder/ns/net-$node" \
    sh -c "ip addr add $subnet.$last/24 dev eth0; ip link set lo up; ip link set eth0 up"
done
munged --force --key-file="$folder/munge/munge.key" --socket="$folder/munge/munge.socket" \
  --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" \
  --seed-file="$folder/munge/munged.seed" --num-threads=2
export SLURM_CONF="$folder/etc/slurm.conf"
slurmctld -c
for _ in $(seq 500); do scontrol ping | grep -q ' UP$' && break; sleep 0.02; done
for node in "$@"; do
  nsenter --net="$folder/ns/net-$node" --uts="$folder/ns/uts-$node" slurmd -N "$node"
done
echo started
read -r _ || true  # until the test closes our stdin, or dies
"""


def why_impossible() -> str | None:
    """What keeps a Slurm from running here; None when it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if lacking:
        packages = "slurmctld slurmd slurm-client munge iproute2 util-linux"
        return f"{', '.join(lacking)} not installed (apt-get install {packages})"
    if os.geteuid() != 0:
        return "not root: namespaces with a network between them need it"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": SEARCH},
    )
    return f"no namespaces or no bridge in them: {probe.stderr.strip()}" if probe.returncode else None


def proctrack() -> str:
    """How Slurm tracks processes here."""
    return "cgroup" if (FREEZER / "tasks").exists() else "linuxproc"


def may_hurry(record: dict[str, str]) -> bool:
    """Whether a requeued job, which waits CRED_EXPIRE + 1 seconds, may start at once: not before a new second has
    begun, or slurmd takes the new start for the old one and refuses it (Job credential revoked; seen in 1 of 4). Not
    either while the scheduler has yet to say when it would."""
    if record["StartTime"] == "Unknown":
        return False
    begins = time.mktime(time.strptime(record["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    return time.time() > begins - CRED_EXPIRE + 1


class Cluster:
    """Context manager: entered with every node idle, left with every process of it gone."""

    def __init__(self, num_nodes: int = 3, *, gpus: int = 8, kill_wait: int = 15, slurmd_timeout: int = 8) -> None:
        # Unix socket paths end at 107 characters, so not pytest's tmp_path.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        # Slurm names freezer cgroups after nodes, outside every namespace: two clusters must not share names.
        prefix = f"c{os.getpid()}x{self.folder.name[-3:]}n".lower().replace("_", "z")
        self.nodes = [f"{prefix}{number}" for number in range(1, num_nodes + 1)]
        self._gpus, self._limits = gpus, {"kill_wait": kill_wait, "slurmd_timeout": slurmd_timeout}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._write()
            self._start()
            self.wait(lambda: self._states() == {"idle"}, 20, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        for node in self.nodes:
            for top, _, _ in os.walk(FREEZER / f"slurm_{node}", topdown=False):
                with suppress(OSError):
                    os.rmdir(top)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("etc", "state", "log", "run", "munge", "dev", "ns", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        key = folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for number in range(self._gpus):  # a "GPU" is a link to a character device: plain files give no index
            (folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        hosts, lines = ["127.0.0.1 localhost", f"{SUBNET}.1 ctl"], []
        for number, node in enumerate(self.nodes, start=11):
            hosts.append(f"{SUBNET}.{number} {node}")
            lines.append(
                f"NodeName={node} NodeAddr={SUBNET}.{number} Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 "
                f"RealMemory=64000 Gres=gpu:{self._gpus} Feature=fast State=UNKNOWN"
            )
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        conf = CONF.format(
            folder=folder,
            subnet=SUBNET,
            nodes="\n".join(lines),
            proctrack=proctrack(),
            cred_expire=CRED_EXPIRE,
            **self._limits,
        )
        (folder / "etc" / "slurm.conf").write_text(conf)
        gres = f"NodeName={','.join(self.nodes)} Name=gpu File={folder}/dev/nvidia[0-{self._gpus - 1}]\n"
        (folder / "etc" / "gres.conf").write_text(gres)
        # Named outright: `autodetect` fails on hosts with mixed mounts, and slurmd loads a cgroup plugin in any case.
        (folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        (folder / "start.sh").write_text(START)

    def _start(self) -> None:
        apart = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", "--uts", "--kill-child"]
        with (self.folder / "log" / "start.err").open("w") as err:
            self._process = subprocess.Popen(
                [*apart, "bash", str(self.folder / "start.sh"), str(self.folder), SUBNET, PACE, *self.nodes],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                env=os.environ | {"PATH": SEARCH},
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "started":
            raise RuntimeError(f"Slurm did not start: {(self.folder / 'log' / 'start.err').read_text()}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._init = int(children.split()[0])

    def _states(self) -> set[str]:
        return set(self.run("sinfo", "-hN", "-o%T").stdout.split())

    # Use

    def inside(self, *command: str | Path, node: str | None = None, cwd: Path | None = None) -> list[str]:
        """`command` as it is run on the controller, or as if logged in to `node`."""
        words = ["nsenter", "-t", str(self._init), "-m", "-p"]
        handles = f"/proc/{self._init}/root{self.folder}/ns"
        words += [f"--net={handles}/net-{node}", f"--uts={handles}/uts-{node}"] if node else ["-n", "-u"]
        return [*words, "env", "-C", str(cwd or self.folder), *map(str, command)]

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's environment with the cluster in it, and no other Slurm's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))}
        return kept | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "PATH": SEARCH} | extra

    def run(
        self,
        *command: str | Path,
        node: str | None = None,
        check: bool = True,
        cwd: Path | None = None,
        timeout: float = 120,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with `check` it must exit 0."""
        done = subprocess.run(
            self.inside(*command, node=node, cwd=cwd),
            env=self.environment(**env),
            timeout=timeout,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert not (check and done.returncode), f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def job(self, job: int | str) -> dict[str, str]:
        """The scheduler's record of a job, field by field; what a hostile folder name adds comes last."""
        words = self.run("scontrol", "show", "job", "-o", str(job)).stdout.split()
        return dict(reversed([word.partition("=")[::2] for word in words if "=" in word]))

    def wait_job(self, job: int | str, seconds: float = 90, states: Collection[str] = FINAL) -> dict[str, str]:
        """The record of a job once it is in one of `states`. A requeued job's waiting time is cut short."""

        def arrived() -> bool:
            record = self.job(job)
            if record["JobState"] == "PENDING" and record["Reason"] == "BeginTime" and may_hurry(record):
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return record["JobState"] in states

        self.wait(arrived, seconds, f"job {job} in {sorted(states)}, not {self.job(job)}")
        return self.job(job)

    @staticmethod
    def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Look until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
            time.sleep(POLL_SECONDS)

    # Faults

    def pids(self, node: str) -> list[str]:
        """Every process of a node, numbered as the cluster sees them."""
        look = """me=$(readlink /proc/self/ns/net)
            for p in /proc/[0-9]*; do
              [ "$(readlink $p/ns/net 2>/dev/null)" = "$me" ] || continue
              pid=${p#/proc/}
              [ $pid = $$ ] || [ "$(cut -d' ' -f4 $p/stat 2>/dev/null)" = $$ ] || echo $pid
            done"""
        return self.run("sh", "-c", look, node=node).stdout.split()

    def link(self, node: str, state: str) -> None:
        """Plug (up) or unplug (down) a node's network cable; its processes live on."""
        self.run("ip", "link", "set", f"v-{node}", state)

    @contextmanager
    def full_speed(self) -> Iterator[None]:
        """Links as fast as the kernel can, without PACE."""
        for node in self.nodes:
            self.run("tc", "qdisc", "del", "dev", f"v-{node}", "root", check=False)
        try:
            yield
        finally:
            for node in self.nodes:
                self.run("tc", "qdisc", "add", "dev", f"v-{node}", "root", *PACE.split(), check=False)

    def power_off(self, node: str) -> None:
        """All processes of a node killed at once, and its cable out."""
        self.link(node, "down")
        self.run("kill", "-9", *self.pids(node), check=False)

    def power_on(self, node: str) -> None:
        """Cable in, slurmd started."""
        self.link(node, "up")
        self.run("slurmd", "-N", node, node=node)
