"""A run over several machines: this one's place among them, and its share of the run.

launch/worker.sh (called by a Slurm task, by launch/ssh.sh or by hand) tells by environment variables where it stands:

    SFT_NNODES=2 SFT_NODE_RANK=0    how many nodes, which one this is
    MASTER_ADDR, MASTER_PORT        where rank 0 listens: the first node's address and a free port there
    SFT_MEETING                     a word that all nodes of this launch share and no other launch uses
    SFT_RUN_SECRET                  what the keys of the ranks' store begin with (128 random bits in hexadecimal digits)

The first node claims the run folder and says in `RUN_DIR/logs/meeting-WORD` which attempt it is; the others wait for
that file, which also proves that they see the same folder. Then each node starts and watches its own workers as on a
single machine. Nobody restarts by himself: one node alone cannot, so that is left to whoever started them all.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sft_dist.config.cluster import SECRET_VARIABLE
from sft_dist.errors import ConfigError, StorageError

MEETING_SECONDS = 120.0  # for the first node to claim the folder, once the others are up
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Nodes:
    """Node `index` of `count`; the rest is unused where there is but one."""

    count: int = 1
    index: int = 0
    address: str = ""
    port: int = 0
    meeting: str = ""
    secret: str = field(default="", repr=False)

    @property
    def are_several(self) -> bool:
        return self.count > 1

    def meeting_path(self, run_dir: Path) -> Path:
        """Where the first node tells the others the attempt."""
        return run_dir / "logs" / f"meeting-{self.meeting}"

    def terms(self, num_processes: int) -> dict[str, int | str]:
        """What must be the same on all nodes: with other secrets ranks would wait for each other until time is up."""
        return {"num_processes": num_processes, "secret": hashlib.sha256(self.secret.encode()).hexdigest()[:16]}


ALONE = Nodes()


def read_nodes(environ: Mapping[str, str]) -> Nodes:
    """The place that the environment tells. Raises ConfigError when it is incomplete or contradicts itself."""
    count, index = _number(environ, "SFT_NNODES", "1"), _number(environ, "SFT_NODE_RANK", "0")
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"SFT_NODE_RANK={index} of SFT_NNODES={count}: must be from 0 to SFT_NNODES - 1")
    if count == 1:
        return ALONE
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "SFT_MEETING") if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"SFT_NNODES={count} needs {', '.join(missing)}: the first node's address, a free port there, "
            "and a word that all nodes of this launch share"
        )
    meeting = environ["SFT_MEETING"]
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,80}", meeting):
        raise ConfigError(f"SFT_MEETING={meeting}: must be letters, digits, dots, - and _")
    secret = environ.get(SECRET_VARIABLE, "")
    if not re.fullmatch(r"([0-9a-f]{32,128})?", secret):
        raise ConfigError(f"{SECRET_VARIABLE}: must be 32 to 128 hexadecimal digits, or unset")
    return Nodes(count, index, environ["MASTER_ADDR"], _number(environ, "MASTER_PORT", "0"), meeting, secret)


def _number(environ: Mapping[str, str], name: str, default: str) -> int:
    text = environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: must be a whole number")
    return int(text)


@contextmanager
def hosting(run_dir: Path, nodes: Nodes, num_processes: int, attempt: int) -> Iterator[None]:
    """First node: tell the others which attempt this is; the word is taken back at the end."""
    path = nodes.meeting_path(run_dir)
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(json.dumps({"attempt": attempt, **nodes.terms(num_processes)}))
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}): make room or move run.dir") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def join(run_dir: Path, nodes: Nodes, num_processes: int, seconds: float = MEETING_SECONDS) -> int:
    """Other nodes: the attempt that the first one has claimed.

    Raises StorageError when nothing is to be seen of it, ConfigError when it starts another number of processes or has
    another secret.
    """
    path, deadline = nodes.meeting_path(run_dir), time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise StorageError(
                f"node {nodes.index}: {path} did not appear within {seconds:.0f} s: the first node has not claimed "
                "the run, or this node does not see the same folder: check the mount"
            )
        time.sleep(_POLL_SECONDS)
    told, ours = json.loads(path.read_text()), nodes.terms(num_processes)
    if told["num_processes"] != ours["num_processes"]:
        raise ConfigError(
            f"node {nodes.index} would start {num_processes} processes, the first node {told['num_processes']}: "
            "set SFT_NPROC (cluster.gpus_per_node) to a number that every node has"
        )
    if told["secret"] != ours["secret"]:
        raise ConfigError(f"{SECRET_VARIABLE} of node {nodes.index} is not the first node's: set it alike on all nodes")
    return int(told["attempt"])
